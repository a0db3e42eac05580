"""How the weight of an open unit is rounded while something is learned about it."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from recon.quantizers.affine import (
    absmax_scale,
    check_group_size,
    clamp_ste,
    compute_dtype,
    dequantize,
    fake_quantize,
    round_ste,
    split_groups,
    weight_range,
)
from recon.quantizers.affine import codes as nearest_codes
from recon.quantizers.ranges import mse_zero_points
from recon.quantizers.rounding import (
    WARMUP,
    beta_schedule,
    hard_codes,
    initial_logits,
    rounding_regularizer,
    soft_codes,
)
from recon.quantizers.spec import QuantSpec

CLIP_LOGIT_START = 4.0
"""sigmoid(4) = 0.982 of the range. Source: FlatQuant, learnable clipping threshold init."""


class NearestRounding(nn.Module):
    """Round-to-nearest on a range that may be clipped by a learned ratio per output row.

    Args:
        rows: Number of output rows of the weight.
        spec: Grid of the weight.
        learn_clip: Whether each row learns the shares of its maximum and minimum that are kept;
            the groups of a row, where there are any, have them in common.
        clip_start: Logit at which the shares start.

    Source: FlatQuant's learnable weight clipping, which S²Q-VDiT trains at ten times the rate of
    the transforms.
    """

    def __init__(
        self,
        rows: int,
        spec: QuantSpec,
        *,
        learn_clip: bool,
        clip_start: float = CLIP_LOGIT_START,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.clip_logits = nn.Parameter(torch.full((rows, 2), clip_start)) if learn_clip else None

    def scale(self, weight: Tensor) -> Tensor:
        """Step size of every row (or group) of `weight` [out, channels]."""
        if self.clip_logits is None:
            return absmax_scale(weight_range(weight, self.spec), self.spec)
        kept = self.clip_logits.sigmoid()
        check_group_size(weight.shape[-1], self.spec)
        parts = weight.unflatten(1, (-1, self.spec.group_size or weight.shape[-1]))
        upper = parts.amax(dim=-1).clamp(min=0) * kept[:, :1]  # over the channels of a group
        lower = parts.amin(dim=-1).clamp(max=0) * kept[:, 1:]
        return absmax_scale(torch.maximum(upper, -lower), self.spec)

    def forward(self, weight: Tensor) -> Tensor:
        """Fake-quantised weight, differentiable; with zero-points it is not, and nothing learns."""
        if not self.spec.symmetric:
            step, zero_point = mse_zero_points(weight, self.spec, grid=1)
            shift = step * zero_point
            return fake_quantize(weight + shift, step, self.spec.signed) - shift
        return fake_quantize(weight, self.scale(weight), self.spec)

    @torch.no_grad()
    def close(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Integer codes and step sizes of `weight`."""
        scale = self.scale(weight)
        return nearest_codes(weight, scale, self.spec), scale


class AdaptiveRounding(nn.Module):
    """Rounding up or down, learned per weight on fixed step sizes.

    Args:
        weight: The weight to be rounded, [out, channels].
        scale: Its step sizes.
        spec: Its grid.
        codes: Codes that it starts halfway to, [out, channels], such as GPTQ's; None: it starts at
            the weight.
        zero_point: Of each row, [out, 1], on an asymmetric grid, whose codes are signed here too:
            what is rounded is the weight shifted by that many steps.

    Source: AdaRound (arXiv 2004.10568) as block reconstruction uses it (BRECQ, PTQ4DiT).
    """

    step: Tensor
    zero_point: Tensor | None
    origin: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        scale: Tensor,
        spec: QuantSpec,
        codes: Tensor | None = None,
        zero_point: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.spec = spec.signed
        self.register_buffer("step", scale.clone())
        self.register_buffer("zero_point", zero_point)
        weight = self._shifted(weight)
        origin = None if codes is None else (weight + dequantize(codes, scale, spec)) / 2
        # Up and down are those of the start: codes may lie further from the weight than one step.
        self.register_buffer("origin", origin)
        self.logits = nn.Parameter(initial_logits(weight if origin is None else origin, scale))

    def scale(self, weight: Tensor) -> Tensor:
        """The fixed step sizes; `weight` is not looked at."""
        return self.step

    def forward(self, weight: Tensor) -> Tensor:
        """Softly rounded weight, differentiable in the logits."""
        soft = soft_codes(self._origin(weight), self.step, self.logits, self.spec)
        if self.zero_point is not None:
            soft = soft - self.zero_point
        return dequantize(soft, self.step, self.spec)

    @torch.no_grad()
    def close(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Integer codes and step sizes of `weight`; the zero-point is `zero_point`."""
        origin = self._origin(weight)
        return hard_codes(origin, self.step, self.logits, self.spec), self.step.clone()

    def _origin(self, weight: Tensor) -> Tensor:
        return self._shifted(weight) if self.origin is None else self.origin

    def _shifted(self, weight: Tensor) -> Tensor:
        return weight if self.zero_point is None else weight + self.step * self.zero_point


class OffsetRounding(nn.Module):
    """Round-to-nearest of W / s + V, with V in [-0.5, 0.5] and s = exp(θ) s0.

    Without learning V and θ are zero: round-to-nearest on the given step sizes. The weight is
    rounded while it is learned, so closing changes no value. A weight that itself learns gets the
    gradient of the rounded one.

    Args:
        weight: The weight to be rounded, [out, channels].
        scale: Its step sizes s0.
        spec: Its grid.
        bounds: Of θ; None: it is not learned.
        learn_offset: Whether V is learned.

    Source: AutoRound (arXiv 2309.05516), SignRound; θ from Q-VLM's specification.
    """

    step: Tensor

    def __init__(
        self,
        weight: Tensor,
        scale: Tensor,
        spec: QuantSpec,
        *,
        bounds: tuple[float, float] | None = None,
        learn_offset: bool = False,
    ) -> None:
        super().__init__()
        self.spec, self._bounds = spec, bounds
        self.register_buffer("step", scale.clone())
        self.offset = nn.Parameter(torch.zeros_like(weight)) if learn_offset else None
        self.log_factor = None if bounds is None else nn.Parameter(torch.zeros_like(scale))

    def scale(self, weight: Tensor) -> Tensor:
        """The step sizes as they are learned; `weight` is not looked at."""
        if self.log_factor is None or self._bounds is None:
            return self.step
        return self.step * clamp_ste(self.log_factor, *self._bounds).exp()

    def forward(self, weight: Tensor) -> Tensor:
        """Rounded weight, differentiable in V and θ."""
        scale = self.scale(weight)
        return dequantize(self._codes(weight, scale), scale, self.spec)

    def _codes(self, weight: Tensor, scale: Tensor) -> Tensor:
        blocks, block_scale = split_groups(weight.to(compute_dtype(weight)), scale, self.spec)
        quotient = (blocks / block_scale).reshape(weight.shape)
        if self.offset is not None:
            quotient = quotient + clamp_ste(self.offset, -0.5, 0.5)
        return round_ste(quotient).clamp(self.spec.qmin, self.spec.qmax)

    @torch.no_grad()
    def close(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Integer codes and step sizes of `weight`."""
        scale = self.scale(weight).clone()
        return self._codes(weight, scale), scale


Rounding = NearestRounding | AdaptiveRounding | OffsetRounding
"""What an open layer rounds its weight by."""


def rounding_penalty(roundings: Iterable[object], progress: float) -> Tensor | None:
    """Sum of the regulariser over the logits of all adaptive roundings; None during warm-up.

    Args:
        roundings: Of a unit's layers; other kinds are passed over.
        progress: Share of the unit's training done, in [0, 1].

    Source: AdaRound, eq. 24, with the schedule of BRECQ and PTQ4DiT.
    """
    if progress < WARMUP:
        return None
    beta = beta_schedule(progress)
    adaptive = (r for r in roundings if isinstance(r, AdaptiveRounding))
    return torch.stack([rounding_regularizer(r.logits, beta) for r in adaptive]).sum()
