import logging

import pytest
import torch
from torch import Tensor

from recon.errors import ConfigError, NumericsError
from recon.quantizers.affine import absmax_scale, codes, dequantize, weight_range
from recon.quantizers.gptq import gptq_codes
from recon.quantizers.spec import QuantSpec
from tests.reference.gptq import gptq_by_columns

SPECS = [
    QuantSpec(num_bits=4),
    QuantSpec(num_bits=3, strategy="group", group_size=8),
    QuantSpec(num_bits=4, strategy="tensor"),
]


def problem(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    mixing = torch.randn(40, 40, generator=generator, dtype=torch.float64)
    inputs = torch.randn(300, 40, generator=generator, dtype=torch.float64) @ mixing
    weight = torch.randn(12, 40, generator=generator, dtype=torch.float64)
    return weight.to(dtype), inputs.t() @ inputs


def scale_of(weight: Tensor, spec: QuantSpec) -> Tensor:
    return absmax_scale(weight_range(weight, spec), spec)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("block_size", [1, 7, 16, 128])
def test_codes_equal_the_textbook_loop(spec: QuantSpec, block_size: int) -> None:
    weight, gram = problem()
    scale = scale_of(weight, spec)
    wide = scale.expand(12, -1).repeat_interleave(40 // scale.shape[1], 1)
    expected = gptq_by_columns(weight, gram, wide, spec.qmin, spec.qmax, 0.01)
    found = gptq_codes(weight, gram, scale, spec, block_size=block_size)
    assert torch.equal(found, expected)
    assert not torch.equal(found, codes(weight, scale, spec))


@pytest.mark.parametrize("spec", SPECS)
def test_identity_gram_is_plain_rounding(spec: QuantSpec) -> None:
    weight, _ = problem(torch.float32)
    scale = scale_of(weight, spec)
    found = gptq_codes(weight, torch.eye(40) * 3, scale, spec, block_size=16)
    assert torch.equal(found, codes(weight, scale, spec))


@pytest.mark.parametrize("spec", SPECS)
def test_output_error_is_below_that_of_plain_rounding(spec: QuantSpec) -> None:
    weight, gram = problem(torch.float32)
    scale = scale_of(weight, spec)

    def output_error(integers: Tensor) -> float:
        difference = (weight - dequantize(integers, scale, spec)).double()
        return float((difference @ gram * difference).sum())

    plain = output_error(codes(weight, scale, spec))
    assert output_error(gptq_codes(weight, gram, scale, spec)) < 0.7 * plain


def test_only_the_shape_of_the_gram_counts_and_runs_agree() -> None:
    weight, gram = problem(torch.float32)
    spec = QuantSpec(num_bits=4)
    scale = scale_of(weight, spec)
    before = weight.clone()
    expected = gptq_codes(weight, gram, scale, spec)
    for factor in (1 / 300, 2.0**-40, 1e12):
        assert torch.equal(gptq_codes(weight, gram * factor, scale, spec), expected)
    assert torch.equal(gptq_codes(weight, gram, scale, spec), expected)
    assert torch.equal(weight, before)


def test_dead_columns_are_rounded_plainly() -> None:
    weight, gram = problem()
    spec = QuantSpec(num_bits=4)
    scale = scale_of(weight, spec)
    dead = torch.tensor([0, 11, 39])
    gram[dead] = 0
    gram[:, dead] = 0
    found = gptq_codes(weight, gram, scale, spec)
    assert torch.equal(found[:, dead], codes(weight, scale, spec)[:, dead])
    alive = torch.tensor([column for column in range(40) if column not in dead.tolist()])
    smaller = gptq_codes(weight[:, alive], gram[alive][:, alive], scale, spec)
    assert torch.equal(found[:, alive], smaller)
    nothing = gptq_codes(weight, torch.zeros_like(gram), scale, spec)
    assert torch.equal(nothing, codes(weight, scale, spec))


def test_damping_grows_and_is_reported_then_refused(caplog: pytest.LogCaptureFixture) -> None:
    weight, gram = problem()
    spec = QuantSpec(num_bits=4)
    scale = scale_of(weight, spec)
    mean = float(gram.diagonal().mean())
    smallest = float(torch.linalg.eigvalsh(gram)[0])
    # Smallest eigenvalue -0.05 of the mean diagonal: 0.01 is too little, 0.1 is enough.
    slightly = gram - (smallest + 0.05 * mean) * torch.eye(40, dtype=gram.dtype)
    with caplog.at_level(logging.WARNING):
        found = gptq_codes(weight, slightly, scale, spec)
    assert "not positive with damping 0.01, retrying with 0.1" in caplog.text
    assert torch.equal(found, gptq_codes(weight, slightly, scale, spec, damping=0.1))
    broken = 2 * torch.eye(40) - torch.ones(40, 40)  # smallest eigenvalue 2 - 40
    with pytest.raises(NumericsError, match=r"gram of 40 inputs is not positive with damping 1 of"):
        gptq_codes(weight, broken, scale, spec)
    with pytest.raises(NumericsError, match=r"diagonal goes down to -\d.* Check that it is x\^T x"):
        gptq_codes(weight, gram - 2 * mean * torch.eye(40), scale, spec)
    singular = torch.ones(40, 40)  # rank one: needs damping, but only little
    assert bool(gptq_codes(weight, singular, scale, spec, damping=0.0).isfinite().all())


def test_errors_name_value_rule_and_remedy() -> None:
    weight, gram = problem()
    spec = QuantSpec(num_bits=4)
    scale = scale_of(weight, spec)
    with pytest.raises(ConfigError, match=r"gram of shape \[39, 40\] for a weight with 40 inputs"):
        gptq_codes(weight, gram[1:], scale, spec)
    with pytest.raises(ConfigError, match=r"scale of shape \[12\], .* needs \[12, 1\]\. Compute"):
        gptq_codes(weight, gram, scale.squeeze(1), spec)
    with pytest.raises(ConfigError, match=r"block_size must be at least 1, got 0\. Use 128"):
        gptq_codes(weight, gram, scale, spec, block_size=0)
    with pytest.raises(ConfigError, match=r"damping must lie in \[0, 1\], got 2\. It is a share"):
        gptq_codes(weight, gram, scale, spec, damping=2)
    with pytest.raises(NumericsError, match=r"gptq_codes: the gram holds NaN or Inf\. Look for"):
        gptq_codes(weight, gram * float("nan"), scale, spec)
    weight[0, 0] = float("inf")
    with pytest.raises(NumericsError, match=r"gptq_codes: the weight holds NaN or Inf"):
        gptq_codes(weight, gram, scale, spec)
