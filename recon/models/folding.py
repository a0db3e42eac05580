"""Scaling what a norm or a linear puts out, without writing to tensors that others share."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from recon.errors import CapabilityMissing
from recon.layers.quant_linear import QuantLinear
from recon.layers.rounding import AdaptiveRounding


@torch.no_grad()
def scale_norm(norm: nn.LayerNorm, scale: Tensor, dtype: torch.dtype) -> None:
    """Multiplies a LayerNorm's output by `scale` [channels], through its elementwise weight.

    Args:
        norm: With a weight (and bias) of its own or without.
        scale: Factor of each channel.
        dtype: Type of the weight if the norm has none yet. The scale is rounded to it.
    """
    if norm.weight is None:
        norm.weight = _parameter(scale, dtype)  # read by forward, also if elementwise_affine is off
        return
    norm.weight = _parameter(norm.weight * scale.to(norm.weight), norm.weight.dtype)
    if norm.bias is not None:
        norm.bias = _parameter(norm.bias * scale.to(norm.bias), norm.bias.dtype)


@torch.no_grad()
def scale_rows(linear: nn.Module, scale: Tensor, start: int = 0) -> None:
    """Multiplies the outputs `start` onwards of a linear by `scale` [rows].

    Quantising each output row on its own commutes with scaling the row, so that of a closed
    QuantLinear only the step sizes and the bias change, and the codes stay. One scale for a whole
    weight becomes one per row. Of an open one the full-precision weight changes, and the step
    sizes that learned rounding holds fixed.

    Args:
        linear: nn.Linear, or QuantLinear with a scale per row, per group or per tensor.
        scale: Factor of each row.
        start: First row.

    Raises:
        CapabilityMissing: It is another module, or an open QuantLinear with one scale for the
            whole weight, whose codes would change.

    Source: PTQ4DiT, eq. 13 and 20, on the rows of the step size (derived: rows commute).
    """
    if isinstance(linear, QuantLinear):
        _scale_quantized_rows(linear, scale, start)
    elif isinstance(linear, nn.Linear):
        linear.weight = _parameter(_scaled(linear.weight, scale, start), linear.weight.dtype)
        if linear.bias is not None:
            linear.bias = _parameter(_scaled(linear.bias, scale, start), linear.bias.dtype)
    else:
        raise CapabilityMissing(
            f"A channel scale cannot be folded into a {type(linear).__name__}; its rows can be "
            "scaled if it is an nn.Linear or a QuantLinear. Fold before it is replaced."
        )


@torch.no_grad()
def add_to_bias(linear: nn.Module, amount: Tensor, start: int = 0) -> None:
    """Adds `amount` [rows] to the outputs `start` onwards of a linear.

    Args:
        linear: nn.Linear or QuantLinear, with a bias.
        amount: For each row.
        start: First row.

    Raises:
        CapabilityMissing: It has no bias.
    """
    bias = linear.bias
    if not isinstance(bias, Tensor):
        raise CapabilityMissing(
            f"A {type(linear).__name__} without a bias cannot take the constant that folding a "
            "channel scale into the layer leaves. Keep the scale at run time."
        )
    moved = bias.detach().clone()
    moved[start : start + len(amount)] += amount.to(moved)
    linear.bias = moved if isinstance(linear, QuantLinear) else _parameter(moved, moved.dtype)


def _scale_quantized_rows(layer: QuantLinear, scale: Tensor, start: int) -> None:
    whole = layer.weight_spec.strategy == "tensor"
    if layer.closed:
        assert layer.scale is not None
        if whole:
            layer.weight_spec = replace(layer.weight_spec, strategy="channel")
        steps = layer.scale.expand(layer.out_features, -1)
        layer.scale = _scaled(steps, scale, start)
    elif whole:
        raise CapabilityMissing(
            "A channel scale cannot be folded into an open QuantLinear of strategy tensor: the "
            "range of its weight would change. Fold after it is closed, or quantise it with "
            "strategy channel or group."
        )
    else:
        assert layer.teacher_weight is not None
        layer.teacher_weight = _scaled(layer.teacher_weight, scale, start)
        if isinstance(layer.rounding, AdaptiveRounding):
            layer.rounding.step = _scaled(layer.rounding.step, scale, start)
    if layer.bias is not None:
        layer.bias = _scaled(layer.bias, scale, start)
    if layer.resident_weight is not None:
        layer.keep_resident(layer.resident_weight.dtype)


def _scaled(rows: Tensor, scale: Tensor, start: int) -> Tensor:
    """A copy of `rows` [out, ...], some of them multiplied by `scale`, rounded once."""
    scaled = rows.detach().clone()
    part = scaled[start : start + len(scale)]
    factor = scale.to(part.device, torch.float64).reshape(-1, *[1] * (rows.dim() - 1))
    part.copy_(part.double() * factor)
    return scaled


def _parameter(value: Tensor, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(value.detach().to(dtype, copy=True), requires_grad=False)
