"""The gradient of a step in half precision: nothing is lost below, nothing overflows above."""

import pytest
import torch
from torch import Tensor, nn

from recon.engine.gradient import flat_gradient, loss_scale, scaled_gradient
from recon.losses.reconstruction import error_and_power, token_weighted_error

TOKENS, CHANNELS = 640, 512


class Learner(nn.Module):
    """A step size of each output of a linear, in float32, in front of products in `dtype`."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.inputs = torch.randn(1, TOKENS, CHANNELS, generator=generator).to(dtype)
        self.weight = torch.randn(CHANNELS, CHANNELS, generator=generator) / CHANNELS**0.5
        self.factor = nn.Parameter(1 + 0.05 * torch.randn(CHANNELS, 1, generator=generator))
        self.target = self.inputs.float() @ self.weight.T

    def forward(self) -> Tensor:
        return self.inputs @ (self.weight * self.factor).to(self.inputs.dtype).T

    def relative(self) -> dict[str, Tensor]:
        """J_B of Q-VLM, of a sample in which one token has nearly all of the power."""
        error, power = error_and_power(self(), self.target, None)
        return {"error": error / (1000 * power)}

    def mean(self) -> dict[str, Tensor]:
        return {"error": token_weighted_error(self(), self.target, None)}

    def summed(self) -> dict[str, Tensor]:
        """Far too large for float16 once it is multiplied."""
        return {"error": 1e6 * token_weighted_error(self(), self.target, None)}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("loss", ["relative", "mean", "summed"])
def test_float16_learns_what_float32_does(loss: str, compiled: bool) -> None:
    exact, half = Learner(torch.float32), Learner(torch.float16)
    if compiled:
        half.compile(dynamic=False)
    expected = flat_gradient(getattr(exact, loss)(), [exact.factor]).gradient
    found = scaled_gradient(getattr(half, loss), [half.factor], torch.float16).gradient
    assert (found - expected).norm() < 0.02 * expected.norm()


def test_unscaled_it_would_learn_nothing() -> None:
    half = Learner(torch.float16)
    assert not flat_gradient(half.relative(), [half.factor]).gradient.any()


def test_what_overflows_unscaled_as_well_is_not_finite() -> None:
    half = Learner(torch.float16)
    step = scaled_gradient(
        lambda: {"error": 1e12 * half.mean()["error"]}, [half.factor], torch.float16
    )
    assert not step.gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_other_types_are_left_as_they_are(dtype: torch.dtype) -> None:
    assert loss_scale(dtype) == 1
