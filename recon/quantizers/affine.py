"""Codes, scales and the differentiable quantiser of weights and tokens.

Everything here runs once per layer and training step, eagerly or inside torch.compile: shapes
decide, data never does. Half-precision tensors are divided and rounded in float32, because a
bfloat16 quotient has so few digits that values near a rounding border get the wrong code.
"""

from typing import Any

import torch
from torch import Tensor

from recon.errors import ConfigError
from recon.quantizers.spec import QuantSpec


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """Float32, or float64 when one of the tensors has it."""
    wide = any(tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if wide else torch.float32


class _RoundStraightThrough(torch.autograd.Function):
    """Round with the gradient of the identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        return grad_outputs[0]


def round_ste(x: Tensor) -> Tensor:
    """Nearest integers, ties to even; the gradient passes unchanged.

    Source: Bengio et al., arXiv 1308.3432 (straight-through estimator).
    """
    rounded: Tensor = _RoundStraightThrough.apply(x)
    return rounded


def clamp_ste(x: Tensor, low: float, high: float) -> Tensor:
    """Values held inside [low, high]; the gradient passes unchanged, so that x finds its way back.

    Source: as `round_ste`.
    """
    return x + (x.clamp(low, high) - x).detach()


def absmax_scale(absmax: Tensor, spec: QuantSpec) -> Tensor:
    """Scale of a range, absmax / spec.denominator, at least float32.

    An all-zero row or token gets scale 1, as does one so small that its scale is zero in the
    arithmetic used: 1 divides safely, and its codes are zero either way.

    Args:
        absmax: Largest magnitude of what shares the scale, not negative.
        spec: Gives the denominator.

    Source: S²Q-VDiT, eq. 1 (qmax); scale 1 as in FlatQuant, quant_utils.py:102-106.
    """
    scale = absmax.to(compute_dtype(absmax)) / spec.denominator
    # Compared with zero, not with a threshold: NaN must stay NaN.
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def split_groups(x: Tensor, scale: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """The tensor and its scale as views that broadcast against each other.

    Strategy group gives [..., groups, group_size] and [..., groups, 1], any other strategy gives
    both tensors back. `flatten(-2)` undoes the split.

    Raises:
        ConfigError: The groups do not tile the last axis.
    """
    if spec.group_size is None:
        return x, scale
    check_group_size(x.shape[-1], spec)
    if scale.shape[-1] * spec.group_size != x.shape[-1]:
        raise ConfigError(
            f"The scale has {scale.shape[-1]} groups, but {x.shape[-1]} inputs in groups of "
            f"{spec.group_size} make {x.shape[-1] // spec.group_size}. Compute the scale with the "
            "same QuantSpec.group_size."
        )
    return x.unflatten(-1, (scale.shape[-1], spec.group_size)), scale.unsqueeze(-1)


def check_group_size(in_features: int, spec: QuantSpec) -> None:
    """Nothing; refuses groups that do not divide the inputs.

    Raises:
        ConfigError: spec.group_size does not divide in_features.
    """
    if spec.group_size is None or in_features % spec.group_size == 0:
        return
    divisors = [d for d in range(2, in_features) if in_features % d == 0]
    nearest = sorted(sorted(divisors, key=lambda d: abs(d - (spec.group_size or 0)))[:3])
    choices = f"Choose a divisor ({', '.join(map(str, nearest))}) or set" if nearest else "Set"
    raise ConfigError(
        f"QuantSpec.group_size is {spec.group_size}, which does not divide the {in_features} "
        f"inputs of the weight. {choices} strategy: channel."
    )


def weight_range(weight: Tensor, spec: QuantSpec) -> Tensor:
    """Largest magnitude of each row [out, 1], of each group [out, groups], or of all [1, 1].

    Args:
        weight: [out, in_].
        spec: Strategy tensor, channel or group.

    Raises:
        ConfigError: spec describes tokens, or its groups do not divide in_.
    """
    if spec.strategy == "token":
        raise ConfigError(
            "QuantSpec.strategy is token, which describes activations, not a weight. "
            "Set strategy: channel, group or tensor for weights."
        )
    if spec.strategy == "tensor":
        return _absmax(weight.flatten()).reshape(1, 1)
    if spec.group_size is None:
        return _absmax(weight)
    check_group_size(weight.shape[-1], spec)
    return _absmax(weight.unflatten(-1, (-1, spec.group_size))).squeeze(-1)


class _AbsMax(torch.autograd.Function):
    """Largest magnitude over the last axis, kept; ties share the gradient evenly.

    The same as abs().amax(), whose backward pass writes five full-size buffers where one will do:
    eagerly, that was the dearest part of quantising a weight.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        absmax = torch.maximum(x.amax(-1, keepdim=True), -x.amin(-1, keepdim=True))
        ctx.save_for_backward(x, absmax)
        return absmax

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        x, absmax = ctx.saved_tensors
        share = x.abs().eq_(absmax)
        # Counted in float32: bfloat16 cannot count beyond 256.
        count = share.sum(-1, keepdim=True, dtype=torch.float32)
        return share.copysign_(x).mul_((grad_outputs[0] / count).to(x.dtype))


def _absmax(x: Tensor) -> Tensor:
    absmax: Tensor = _AbsMax.apply(x)
    return absmax


def codes(x: Tensor, scale: Tensor, spec: QuantSpec) -> Tensor:
    """Integers clamp(round(x / scale), qmin, qmax) in a float tensor of x's shape.

    Args:
        x: [out, in_], or [..., channels] for tokens.
        scale: Positive; broadcasts against x, or [out, groups] with strategy group.
        spec: Gives the strategy and the ends of the codes.

    Raises:
        ConfigError: The groups do not tile x.

    Source: S²Q-VDiT, eq. 1.
    """
    blocks, block_scale = split_groups(x, scale, spec)
    dtype = compute_dtype(x)
    quotient = blocks.to(dtype) / block_scale.to(dtype)
    return quotient.round().clamp(spec.qmin, spec.qmax).reshape(x.shape)


def dequantize(codes: Tensor, scale: Tensor, spec: QuantSpec) -> Tensor:
    """Values codes * scale, in the dtype of the scale.

    Args:
        codes: Integers in any dtype.
        scale: As it is stored: rounded to its stored dtype before the codes were made.
        spec: Gives the strategy.

    Raises:
        ConfigError: The groups do not tile the codes.
    """
    blocks, block_scale = split_groups(codes, scale, spec)
    return (blocks.to(scale.dtype) * block_scale).reshape(codes.shape)


class _FakeQuantize(torch.autograd.Function):
    """clamp(round(x / s)) * s with two full-size temporaries, saving nothing but x and s.

    Plain autograd would keep the quotient and the codes for the backward pass; both are cheaper
    to compute again than to store for every weight and activation of a block.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, qmin: int, qmax: int) -> Tensor:
        ctx.save_for_backward(x, scale)
        ctx.qmin, ctx.qmax = qmin, qmax
        dtype = compute_dtype(x)
        wide_scale = scale.to(dtype)
        code = (x.to(dtype) / wide_scale).round_().clamp_(qmin, qmax)
        # torch 2.11, compiling, loses the gradient of a result that is not an operation's new
        # tensor: neither changed in place, nor through a `to` that has nothing to do.
        value = code * wide_scale
        return value if value.dtype == x.dtype else value.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        x, scale = ctx.saved_tensors
        dtype = compute_dtype(x)
        quotient = x.to(dtype) / scale.to(dtype)
        rounded = quotient.round()
        clipped = rounded.clamp(ctx.qmin, ctx.qmax)
        inside = rounded.eq_(clipped)  # 1 or 0, in place: full-size buffers are what this costs
        grad_scale = None
        if ctx.needs_input_grad[1]:
            # d(s * code)/ds is code - x/s where the round is passed through, the code where the
            # clamp holds it.
            share = clipped.sub_(quotient.mul_(inside)).mul_(grad)
            grad_scale = share.sum_to_size(scale.shape).to(scale.dtype)
        grad_x = inside.mul_(grad).to(x.dtype) if ctx.needs_input_grad[0] else None
        return grad_x, grad_scale, None, None


def fake_quantize(x: Tensor, scale: Tensor, spec: QuantSpec) -> Tensor:
    """Values of x on the grid of the scale, in x's dtype and shape; differentiable.

    The gradient passes the round unchanged and stops at the clamp. It reaches the scale as well:
    round(x/s) - x/s inside the range, qmin or qmax outside. A value whose rounded quotient is
    qmin or qmax still counts as inside.

    Args:
        x: [out, in_], or [..., channels] for tokens.
        scale: Positive; broadcasts against x, or [out, groups] with strategy group.
        spec: Gives the strategy and the ends of the codes.

    Raises:
        ConfigError: The groups do not tile x.

    Source: S²Q-VDiT, eq. 1, with the straight-through round.
    """
    blocks, block_scale = split_groups(x, scale, spec)
    value: Tensor = _FakeQuantize.apply(blocks, block_scale, spec.qmin, spec.qmax)
    return value.reshape(x.shape)


def fake_quantize_tokens(x: Tensor, spec: QuantSpec, clip: Tensor | None = None) -> Tensor:
    """Values of x on a grid of its own for each token, in x's dtype; differentiable.

    The scale is the larger of both clipped ends of the token's range, zero kept inside, divided
    by spec.denominator. An all-zero token stays zero. The gradient reaches x (through the value
    and through the range) and clip.

    Args:
        x: [..., channels].
        spec: Strategy token.
        clip: Ratios (upper, lower) in (0, 1] that shrink the maximum and the minimum; None keeps
            the full range.

    Raises:
        ConfigError: spec does not describe tokens.

    Source: S²Q-VDiT, eq. 1 and FlatQuant's learned activation clipping.
    """
    if spec.strategy != "token":
        raise ConfigError(
            f"QuantSpec.strategy is {spec.strategy}, which has no range per token. "
            "Set strategy: token and dynamic: true for activations."
        )
    # Zero inside keeps an all-positive token from counting its minimum as a negative range.
    upper = x.amax(-1, keepdim=True).clamp_min(0)
    lower = x.amin(-1, keepdim=True).clamp_max(0)
    if clip is not None:
        upper, lower = upper * clip[0], lower * clip[1]
    return fake_quantize(x, absmax_scale(torch.maximum(upper, -lower), spec), spec)


def static_grids(low: Tensor, high: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Step sizes and zero-points of fixed ranges, float64 in the shape of `low`.

    A symmetric quantiser takes the larger end and the zero-point 0. An asymmetric one spans
    [low, high], with zero inside, in 2^bits - 1 steps. A range of nothing but zero gets step 1.

    Args:
        low: Lower ends, at most 0 or taken as 0; any shape.
        high: Upper ends, at least 0 or taken as 0.
        spec: Strategy tensor or channel.

    Source: PTQ4DiT, quant_layer.py (asymmetric).
    """
    low, high = low.double().clamp(max=0), high.double().clamp(min=0)
    if spec.symmetric:
        step = torch.maximum(-low, high) / spec.denominator
    else:
        step = (high - low) / (spec.qmax - spec.qmin)
    step = torch.where(step > 0, step, 1.0)
    zero_point = torch.zeros_like(step) if spec.symmetric else (-low / step).round()
    return step, zero_point


def static_grid(low: float, high: float, spec: QuantSpec) -> tuple[float, float]:
    """`static_grids` of a single range, in Python floats."""
    lowest, highest = (torch.tensor(end, dtype=torch.float64) for end in (low, high))
    step, zero_point = static_grids(lowest, highest, spec)
    return float(step), float(zero_point)


def fake_quantize_static(x: Tensor, step: Tensor, zero_point: Tensor, spec: QuantSpec) -> Tensor:
    """Values of x on one fixed grid, differentiable in x and in the step.

    The gradient of the step is round(x/s) - x/s inside the range, and the code less the zero-point
    where the clamp holds it; x gets no gradient there.

    Args:
        x: Any shape.
        step: Positive, a scalar or [channels].
        zero_point: Code of zero, integers in a float tensor of the shape of `step`.
        spec: Strategy tensor or channel.

    Source: PTQ4DiT, quant_layer.py: plain autograd through round and clamp, without LSQ's factor.
    """
    code = torch.clamp(round_ste(x / step), spec.qmin - zero_point, spec.qmax - zero_point)
    return code * step
