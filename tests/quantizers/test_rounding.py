import pytest
import torch

from recon.errors import ConfigError
from recon.quantizers import rounding
from recon.quantizers.affine import absmax_scale, codes, weight_range
from recon.quantizers.spec import QuantSpec


@pytest.mark.parametrize(
    "spec", [QuantSpec(num_bits=4), QuantSpec(num_bits=3, strategy="group", group_size=8)]
)
def test_training_starts_at_the_weight_and_hardens_to_plain_rounding(spec: QuantSpec) -> None:
    weight = torch.randn(5, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scale = absmax_scale(weight_range(weight, spec), spec)
    logits = rounding.initial_logits(weight, scale)
    wide = scale.repeat_interleave(32 // scale.shape[1], 1)
    fraction = weight / wide - (weight / wide).floor()
    torch.testing.assert_close(rounding.rectified_sigmoid(logits), fraction)
    soft = rounding.soft_codes(weight, scale, logits, spec)
    torch.testing.assert_close(soft, weight / wide)
    hard = rounding.hard_codes(weight, scale, logits, spec)
    assert torch.equal(hard, codes(weight, scale, spec))


def test_negative_weights_are_rounded_up_from_their_floor() -> None:
    weight = torch.tensor([[0.25, -0.25, 0.9]])
    logits = rounding.initial_logits(weight, torch.ones(1, 1))
    torch.testing.assert_close(
        rounding.rectified_sigmoid(logits), torch.tensor([[0.25, 0.75, 0.9]])
    )


def test_codes_stay_on_the_grid_and_follow_the_logits() -> None:
    spec = QuantSpec(num_bits=2)
    weight, scale = torch.tensor([[-9.0, 0.4, 9.0]]), torch.ones(1, 1)
    up, down = torch.full((1, 3), 9.0), torch.full((1, 3), -9.0)
    assert rounding.hard_codes(weight, scale, up, spec).tolist() == [[-2, 1, 1]]
    assert rounding.hard_codes(weight, scale, down, spec).tolist() == [[-2, 0, 1]]
    assert torch.equal(
        rounding.soft_codes(weight, scale, up, spec), rounding.hard_codes(weight, scale, up, spec)
    )
    logits = torch.zeros(1, 3, requires_grad=True)
    soft = rounding.soft_codes(weight, scale, logits, spec)
    (grad,) = torch.autograd.grad(soft.sum(), logits)
    assert grad.tolist() == [[0.0, pytest.approx(0.3), 0.0]]  # 1.2 * sigmoid'(0); clamped: none


def test_regularizer_is_a_sum_that_ends_at_zero() -> None:
    undecided, decided = torch.zeros(2, 3), torch.tensor([[9.0, -9.0, 9.0]])
    assert rounding.rounding_regularizer(undecided, 20.0).item() == 6
    assert rounding.rounding_regularizer(decided, 20.0).item() == 0
    logits = torch.tensor([0.7, -0.3], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: rounding.rounding_regularizer(x, 4.0), (logits,))


def test_beta_is_flat_then_linear() -> None:
    values = [rounding.beta_schedule(progress) for progress in (0, 0.1, 0.2, 0.6, 1.0)]
    assert values == pytest.approx([20, 20, 20, 11, 2])
    assert rounding.beta_schedule(0.5, start=10, end=0, warmup=0) == pytest.approx(5)
    with pytest.raises(ConfigError, match=r"progress must lie in \[0, 1\], got 1\.5\. Divide"):
        rounding.beta_schedule(1.5)
    with pytest.raises(ConfigError, match=r"warmup must lie in \[0, 1\), got 1\.0\. It is a share"):
        rounding.beta_schedule(0.5, warmup=1.0)
