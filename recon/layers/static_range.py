"""A fixed grid for activations, one for all tokens and timesteps."""

from typing import Literal

import torch
from torch import Tensor, nn

from recon.quantizers.affine import fake_quantize_static, static_grid
from recon.quantizers.spec import QuantSpec


def on_own_range(inputs: Tensor, spec: QuantSpec) -> Tensor:
    """Inputs on the grid of their own range, one for the whole tensor.

    The yardstick of a fixed grid, rounding to nearest without calibration: a range that fits each
    call is better than a fixed one, so that it is not beaten for being naive.

    Args:
        inputs: Float32, any shape.
        spec: Strategy tensor.
    """
    grid = static_grid(float(inputs.min()), float(inputs.max()), spec)
    step, zero_point = (inputs.new_tensor(value) for value in grid)
    return fake_quantize_static(inputs, step, zero_point, spec)


class StaticRange(nn.Module):
    """Quantises what passes on one grid, whose step size may be learned; the zero-point is fixed.

    Args:
        low: Lower end of the range the grid starts from.
        high: Upper end.
        spec: Strategy tensor.
        learn: `log` learns the logarithm of the step, which stays positive and moves alike for
            large and small steps; `absolute` the step itself, as PTQ4DiT's code; None neither.

    Source: PTQ4DiT (arXiv 2405.16005), joint reconstruction. Deviates: log.
    """

    step: Tensor
    zero_point: Tensor

    def __init__(
        self, low: float, high: float, spec: QuantSpec, learn: Literal["log", "absolute"] | None
    ) -> None:
        super().__init__()
        self.spec = spec
        step, zero_point = static_grid(low, high, spec)
        self.register_buffer("zero_point", torch.tensor(zero_point))
        self.log_step = nn.Parameter(torch.tensor(step).log()) if learn == "log" else None
        if learn == "absolute":
            self.step = nn.Parameter(torch.tensor(step))
        else:
            self.register_buffer("step", torch.tensor(step))

    @classmethod
    def closed(cls, step: Tensor, zero_point: Tensor, spec: QuantSpec) -> "StaticRange":
        """A range with this grid."""
        made = cls(0.0, 0.0, spec, None)
        made.step, made.zero_point = step, zero_point
        return made

    def forward(self, inputs: Tensor) -> Tensor:
        """Inputs on the grid, float32."""
        step = self.step if self.log_step is None else self.log_step.exp()
        return fake_quantize_static(inputs.float(), step, self.zero_point, self.spec)

    @torch.no_grad()
    def fold(self) -> None:
        """Turns what was learned into a buffer; idempotent."""
        step = self.step if self.log_step is None else self.log_step.exp()
        self.log_step = None
        kept = step.detach().clone()
        if isinstance(self.step, nn.Parameter):
            # An absolute step may have been driven below zero; its grid is the same.
            kept = kept.abs()
            del self.step
            self.register_buffer("step", kept)
        else:
            self.step = kept
