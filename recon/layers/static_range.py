"""A fixed grid for activations, for all tokens and timesteps; one, or one per channel."""

from typing import Literal

import torch
from torch import Tensor, nn

from recon.quantizers.affine import clamp_ste, fake_quantize_static, static_grids
from recon.quantizers.spec import QuantSpec


def on_own_range(inputs: Tensor, spec: QuantSpec) -> Tensor:
    """Inputs on the grid of their own range, one for the whole tensor or one for each channel.

    The yardstick of a fixed grid, rounding to nearest without calibration: a range that fits each
    call is better than a fixed one, so that it is not beaten for being naive.

    Args:
        inputs: Float32, [..., channels].
        spec: Strategy tensor or channel.
    """
    values = (
        inputs.reshape(-1) if spec.strategy == "tensor" else inputs.reshape(-1, inputs.shape[-1])
    )
    grid = static_grids(*values.aminmax(dim=0), spec)
    step, zero_point = (part.to(inputs) for part in grid)
    return fake_quantize_static(inputs, step, zero_point, spec)


class StaticRange(nn.Module):
    """Quantises what passes on one grid, whose step size may be learned; the zero-point is fixed.

    Args:
        low: Lower end of the range the grid starts from, a scalar or [channels].
        high: Upper end.
        spec: Strategy tensor, or channel with ends for each channel.
        learn: `log` learns the logarithm of the step, which stays positive and moves alike for
            large and small steps; `absolute` the step itself, as PTQ4DiT's code; None neither.
        bounds: Of the logarithm of the factor by which a step learned as `log` may leave its start;
            None: no bounds.

    Source: PTQ4DiT (arXiv 2405.16005), joint reconstruction. Deviates: log.
    """

    step: Tensor
    zero_point: Tensor

    def __init__(
        self,
        low: float | Tensor,
        high: float | Tensor,
        spec: QuantSpec,
        learn: Literal["log", "absolute"] | None,
        *,
        bounds: tuple[float, float] | None = None,
    ) -> None:
        super().__init__()
        self.spec, self._bounds = spec, bounds
        step, zero_point = self._grid(low, high)
        self.register_buffer("zero_point", zero_point)
        self.log_step = nn.Parameter(step.log()) if learn == "log" else None
        if learn == "absolute":
            self.step = nn.Parameter(step)
        else:
            self.register_buffer("step", step)

    def _grid(self, low: float | Tensor, high: float | Tensor) -> tuple[Tensor, Tensor]:
        step, zero_point = static_grids(torch.as_tensor(low), torch.as_tensor(high), self.spec)
        return step.float(), zero_point.float()

    def move(self, low: float | Tensor, high: float | Tensor) -> None:
        """Takes the grid of another range; of a range that is not learned."""
        assert self.log_step is None
        self.step, self.zero_point = (part.to(self.step) for part in self._grid(low, high))

    @classmethod
    def closed(cls, step: Tensor, zero_point: Tensor, spec: QuantSpec) -> "StaticRange":
        """A range with this grid."""
        made = cls(0.0, 0.0, spec, None)
        made.step, made.zero_point = step, zero_point
        return made

    def forward(self, inputs: Tensor) -> Tensor:
        """Inputs on the grid, float32."""
        return fake_quantize_static(inputs.float(), self._step(), self.zero_point, self.spec)

    def _step(self) -> Tensor:
        if self.log_step is None:
            return self.step
        if self._bounds is None:
            return self.log_step.exp()
        return self.step * clamp_ste(self.log_step - self.step.log(), *self._bounds).exp()

    @torch.no_grad()
    def fold(self) -> None:
        """Turns what was learned into a buffer; idempotent."""
        kept = self._step().detach().clone()
        self.log_step = None
        if isinstance(self.step, nn.Parameter):
            # An absolute step may have been driven below zero; its grid is the same.
            kept = kept.abs()
            del self.step
            self.register_buffer("step", kept)
        else:
            self.step = kept
