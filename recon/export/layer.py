"""A closed layer as plain numbers: what a format has to hold."""

import math
from collections import Counter
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from recon.layers.quant_linear import QuantLinear
from recon.layers.static_range import StaticRange
from recon.quantizers.packing import unpack
from recon.quantizers.transforms import apply_kronecker

Obstacle = Callable[[QuantLinear], str | None]
"""Why a layer does not fit, as the end of a sentence that begins with its name."""


def codes(layer: QuantLinear) -> Tensor:
    """Integer weight, int8 [out, channels]."""
    assert layer.codes is not None
    return unpack(layer.codes, layer.weight_spec.num_bits, layer.in_features)


def step_sizes(layer: QuantLinear) -> Tensor:
    """Step size of each output row [out, 1], or of each group of its inputs [out, groups].

    One step size of a whole weight is that of each of its rows.
    """
    assert layer.scale is not None
    return layer.scale.expand(layer.out_features, -1).contiguous()


def group_size(layer: QuantLinear) -> int:
    """Inputs that share a step size: all of them where a row has one."""
    return layer.weight_spec.group_size or layer.in_features


def channel_scale(layer: QuantLinear) -> Tensor | None:
    """Factor of each input channel in front of the weight, [channels]."""
    return None if layer.transform is None else layer.transform.channel_scale


def static_range(layer: QuantLinear) -> StaticRange | None:
    """The fixed grid of the input."""
    return None if layer.transform is None else layer.transform.static


@torch.no_grad()
def merged_weight(layer: QuantLinear) -> Tensor:
    """The de-quantised weight with the input transform multiplied into it, float64 [out, in_].

    ((x ∘ s) P ∘ r) W̃ᵀ = x ((W̃ ∘ r) Pᵀ ∘ s)ᵀ, and the transpose of kron(A, B) is kron(Aᵀ, Bᵀ).
    """
    # float64: rounding the product once, later, is all that merging costs.
    weight = layer.quantized_weight().double()
    transform = layer.transform
    if transform is None:
        return weight
    if transform.rotated_scale is not None:
        weight = weight * transform.rotated_scale
    if transform.left is not None and transform.right is not None:
        weight = apply_kronecker(weight, transform.left.T, transform.right.T)
    return weight if transform.channel_scale is None else weight * transform.channel_scale


def weights_only(layer: QuantLinear) -> None:
    """Leaves the input of the layer as it is; transform and weight stay."""
    layer.activation_spec = None
    if layer.transform is not None:
        layer.transform.static = None


def rotated(layer: QuantLinear) -> str | None:
    """Obstacle: what is applied to the input is more than a factor for each channel."""
    transform = layer.transform
    if transform is None or (transform.left is None and transform.rotated_scale is None):
        return None
    return "multiplies its input by a learned rotation before every call"


def clipped(layer: QuantLinear) -> str | None:
    """Obstacle: a token's range is not the whole of it."""
    clip = layer.activation_clip
    if layer.activation_spec is None or clip is None or bool((clip == 1).all()):
        return None
    upper, lower = clip.tolist()
    reason = "quantises tokens on a learned share of their range"
    if math.isnan(upper):  # of a run that is still to be made
        return reason
    return f"{reason} ({upper:.3f} of the maximum, {lower:.3f} of the minimum)"


def otherwise_ranged(layer: QuantLinear) -> str | None:
    """Obstacle: the scale of a token is not absmax / ((2^bits - 1) / 2)."""
    spec = layer.activation_spec
    if spec is None or spec.strategy != "token" or spec.scale_denominator == "half_range":
        return None
    return (
        f"divides a token's range by {spec.qmax} (scale_denominator qmax), where loaders divide by "
        f"{(spec.qmax - spec.qmin) / 2}; fit with --model.activation.scale_denominator half_range"
    )


def shifted(layer: QuantLinear) -> str | None:
    """Obstacle: the codes of a row have a zero-point."""
    if layer.zero_point is None:
        return None
    return (
        "has a zero-point for each row of its weight, which is not written here: transformers does "
        "not reload asymmetric 4-bit weights; fit with --model.weight.symmetric true"
    )


def oddly_shared(layer: QuantLinear) -> str | None:
    """Obstacle: a scale of activations that is neither a token's nor the whole tensor's."""
    spec = layer.activation_spec
    if spec is None or spec.strategy in ("token", "tensor"):
        return None
    return f"has activations of strategy {spec.strategy}; loaders know token and tensor"


def obstacles(layers: Mapping[str, QuantLinear], *checks: Obstacle) -> list[str]:
    """Sentences about the layers that do not fit, equal ones joined; empty if all fit."""
    found: Counter[str] = Counter()
    first: dict[str, str] = {}
    for name, layer in layers.items():
        for check in checks:
            reason = check(layer)
            if reason is not None:
                kind = f"{check.__module__}.{check.__qualname__}"
                found[kind] += 1
                first.setdefault(kind, f"{name} {reason}")
    return [
        sentence + (f" (and {found[kind] - 1} more layers do alike)" if found[kind] > 1 else "")
        for kind, sentence in first.items()
    ]
