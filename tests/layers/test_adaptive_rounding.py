import pytest
import torch

from recon.layers.rounding import AdaptiveRounding
from recon.quantizers.affine import absmax_scale, codes, dequantize, weight_range
from recon.quantizers.spec import QuantSpec


@pytest.mark.parametrize(
    "spec", [QuantSpec(num_bits=4), QuantSpec(num_bits=3, strategy="group", group_size=8)]
)
def test_it_starts_halfway_to_given_codes_and_goes_to_either_side_of_that(spec: QuantSpec) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 32, generator=generator, dtype=torch.float64)
    scale = absmax_scale(weight_range(weight, spec), spec)
    shift = torch.randint(-2, 3, weight.shape, generator=generator)
    given = (codes(weight, scale, spec) + shift).clamp(spec.qmin, spec.qmax)
    halfway = (weight + dequantize(given, scale, spec)) / 2
    rounding = AdaptiveRounding(weight, scale, spec, given)
    torch.testing.assert_close(rounding(weight), halfway)
    found, step = rounding.close(weight)
    assert torch.equal(step, scale)
    quotient = halfway / scale.repeat_interleave(32 // scale.shape[1], 1)
    assert float((found - quotient).abs().max()) <= 0.5 + 1e-9
    assert not torch.equal(found, codes(weight, scale, spec))
    for logit, expected in ((9.0, quotient.floor() + 1), (-9.0, quotient.floor())):
        with torch.no_grad():
            rounding.logits.fill_(logit)
        assert torch.equal(rounding.close(weight)[0], expected.clamp(spec.qmin, spec.qmax))


def test_without_codes_it_starts_at_the_weight_and_keeps_no_copy_of_it() -> None:
    spec = QuantSpec(num_bits=4)
    weight = torch.randn(3, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rounding = AdaptiveRounding(weight, absmax_scale(weight_range(weight, spec), spec), spec)
    torch.testing.assert_close(rounding(weight), weight)
    assert set(rounding.state_dict()) == {"step", "logits"}
