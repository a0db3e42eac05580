"""Ranges narrower than a row's absolute maximum: searched, or clipped by learned ratios."""

import torch
from torch import Tensor

from recon.errors import ConfigError
from recon.quantizers.affine import (
    absmax_scale,
    codes,
    compute_dtype,
    dequantize,
    fake_quantize_static,
    split_groups,
    static_grid,
    static_grids,
    weight_range,
)
from recon.quantizers.spec import QuantSpec

LOWEST_RATIO = 0.2
"""Smallest ratio searched: BRECQ's and Q-Diffusion's 80 shrink steps of 1 % end near 0.2."""


def mse_clip_ratio(weight: Tensor, spec: QuantSpec, grid: int = 80) -> Tensor:
    """Ratio in [0.2, 1] of each range at which quantising the weight costs the least square error.

    The scale to use is `absmax_scale(weight_range(weight, spec) * ratio, spec)`. Among equal
    errors the widest range wins, so an all-zero row gets 1.

    Args:
        weight: [out, in_].
        spec: Strategy tensor, channel or group.
        grid: Number of ratios, evenly spaced from 0.2 to 1, at least 2; the baselines use 80 or
            more.

    Returns:
        Ratios in the shape of `weight_range`: [out, 1], [out, groups] or [1, 1].

    Raises:
        ConfigError: grid is below 2, or spec does not fit the weight.

    Source: Q-Diffusion, quant_layer.py ("mse" scale search); deviates: exponent 2 instead of 2.4.
    """
    if grid < 2:
        raise ConfigError(
            f"mse_clip_ratio searches at least 2 ratios, got grid {grid}. Use 80 or more, or leave "
            "the search out for the full range."
        )
    with torch.no_grad():
        full = weight_range(weight, spec).to(compute_dtype(weight))
        best_ratio = torch.ones_like(full)
        best_error = _square_error(weight, full, spec)
        # One ratio at a time: all at once would hold `grid` copies of the weight.
        for ratio in torch.linspace(1.0, LOWEST_RATIO, grid).tolist()[1:]:
            error = _square_error(weight, full * ratio, spec)
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best_ratio = best_ratio.masked_fill(better, ratio)
    return best_ratio


def mse_zero_points(weight: Tensor, spec: QuantSpec, grid: int = 80) -> tuple[Tensor, Tensor]:
    """Step size and zero-point of each row at which quantising it costs the least square error.

    Both ends of a row's range, zero inside, shrink by the same ratios as in `mse_clip_ratio`.

    Args:
        weight: [out, in_].
        spec: Asymmetric, of strategy channel.
        grid: Number of ratios; 1: the full range.

    Returns:
        Steps, and zero-points of signed codes, whole numbers in [-2^(bits-1), 2^(bits-1) - 1];
        both float32 [out, 1].

    Source: PTQ4DiT, quant_layer.py. Deviates: a grid of ranges, not 3 percentiles.
    """
    weight = weight.detach()
    low, high = weight.amin(dim=1, keepdim=True), weight.amax(dim=1, keepdim=True)  # over inputs
    best_step, best_zero_point = (part.float() for part in static_grids(low, high, spec))
    least = torch.full_like(best_step, torch.inf, dtype=torch.float64)
    for ratio in torch.linspace(1.0, LOWEST_RATIO, grid).tolist():
        grids = static_grids(low * ratio, high * ratio, spec)
        step, zero_point = (part.float() for part in grids)
        made = fake_quantize_static(weight, step, zero_point, spec)
        error = (made - weight).double().square().sum(dim=1, keepdim=True)
        better = error < least
        least = torch.where(better, error, least)
        best_step = torch.where(better, step, best_step)
        best_zero_point = torch.where(better, zero_point, best_zero_point)
    return best_step, best_zero_point + spec.signed.qmin


def static_range_errors(
    tokens: Tensor, low: float, high: float, spec: QuantSpec, grid: int = 80
) -> tuple[Tensor, Tensor]:
    """Ratios of a fixed range, and the summed square error that each of them costs.

    Errors of parts of the tokens may be added up before the least is taken.

    Args:
        tokens: Some of what will be quantised, any shape.
        low: Lower end of the full range.
        high: Upper end.
        spec: Strategy tensor.
        grid: Number of ratios, evenly spaced from 1 down to 0.2, at least 2.

    Returns:
        Ratios, on the CPU, and errors, where the tokens are, float64 [grid] each.

    Source: as `mse_clip_ratio`, on activations.
    """
    ratios = torch.linspace(1.0, LOWEST_RATIO, grid, dtype=torch.float64)
    errors = []
    for ratio in ratios.tolist():
        step, zero_point = (
            tokens.new_tensor(v) for v in static_grid(low * ratio, high * ratio, spec)
        )
        difference = fake_quantize_static(tokens, step, zero_point, spec) - tokens
        errors.append(difference.double().square().sum())
    return ratios, torch.stack(errors)


def _square_error(weight: Tensor, absmax: Tensor, spec: QuantSpec) -> Tensor:
    """Summed square error of each range, in the shape of absmax."""
    scale = absmax_scale(absmax, spec)
    square = (dequantize(codes(weight, scale, spec), scale, spec) - weight).square_()
    blocks, block_scale = split_groups(square, scale, spec)
    return blocks.sum_to_size(block_scale.shape).reshape(scale.shape)


def clip_rows(weight: Tensor, upper_ratio: Tensor, lower_ratio: Tensor) -> Tensor:
    """Weight with each row held inside [row minimum * lower ratio, row maximum * upper ratio].

    Zero is kept inside the range. Differentiable in the weight and in both ratios; the range of
    the quantiser is then taken from the clipped weight.

    Args:
        weight: [out, in_].
        upper_ratio: In (0, 1], [out, 1].
        lower_ratio: In (0, 1], [out, 1].

    Source: FlatQuant's learned weight clipping, as used by S²Q-VDiT (one pair per output channel).
    """
    upper = weight.amax(-1, keepdim=True).clamp_min(0) * upper_ratio
    lower = weight.amin(-1, keepdim=True).clamp_max(0) * lower_ratio
    return torch.minimum(torch.maximum(weight, lower), upper)
