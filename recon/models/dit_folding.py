"""Channel scales of a DiT block, taken over by the norms and linears in front."""

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from recon.errors import CapabilityMissing, ConfigError, NumericsError
from recon.layers.quant_attention import QuantAttention
from recon.models.folding import add_to_bias, scale_norm, scale_rows

FOLDABLE = ("attn1.to_q", "attn1.to_out.0", "ff.net.0.proj")
"""Query, key and value; the attention's output; the first feed-forward layer. The second one has a
GELU before it, and norm1.linear a SiLU: neither lets a scale through."""

MODULATED = {"attn1.to_q": ("norm1.norm", 0), "ff.net.0.proj": ("norm3", 3)}
"""Foldable inputs behind a norm: that norm, and which sixth of norm1.linear's rows is the shift.
The sixths are shift β, scale γ, gate of the attention, then of the feed-forward."""


def fold(block: nn.Module, scales: Mapping[str, Tensor]) -> None:
    """Scales inputs of linears by changing the norms, norm1.linear and to_v before them.

    LN(z) ∘ (1 + γ) ∘ b + β ∘ b = (LN(z) ∘ b) ∘ (1 + γ) + (β ∘ b): the norm gets the weight b
    and the rows of norm1.linear that make the shift β are multiplied by b. A norm has no
    such weight in the public class, so a folded network is saved with one tensor more for each
    norm. That weight has the block's type: in half precision, give scales that this type
    holds (`scale.bfloat16()`) and divide the linears by the same, or its rounding remains.
    to_v is divided in its columns for one scale and multiplied in its rows for another: in
    either order, but its columns before it is quantised.

    Deviates from PTQ4DiT, eq. 13 and 20, which scale the rows of γ too and replace the 1 by
    the vector b. Keeping the 1, as a public model file would have to, means rows b(1 + γ) - 1,
    which cancel for small b: 10 % error in bfloat16 at b = 0.01. Here γ stays as it is, so
    that nothing cancels in any type, and fewer rows change.

    Raises:
        CapabilityMissing: A name is not foldable, or a producer cannot take a scale.
        ConfigError: A scale has another shape than the input has channels.
        NumericsError: A scale is not positive and finite.
    """
    modulation, width = _fold_values(block, scales)
    for name, scale in scales.items():
        if name in MODULATED:
            norm, chunk = MODULATED[name]
            scale_rows(modulation, scale, start=chunk * width)
            scale_norm(
                cast(nn.LayerNorm, block.get_submodule(norm)), scale, _floating_type(modulation)
            )


def fold_within_class(block: nn.Module, scales: Mapping[str, Tensor]) -> None:
    """As `fold`, but the rows of γ take the scale: b(1 + γ) = 1 + (bγ + b - 1).

    The public class then holds all of it. In half precision bγ + b - 1 has lost what b(1 + γ)
    keeps where b is small: give the bias a wide type, and compare what comes out.

    Raises:
        CapabilityMissing: As `fold`; or norm1.linear has no bias.
        ConfigError: As `fold`.
        NumericsError: As `fold`.

    Source: PTQ4DiT, eq. 13 and 20.
    """
    modulation, width = _fold_values(block, scales)
    for name, scale in scales.items():
        if name in MODULATED:
            _, chunk = MODULATED[name]
            scale_rows(modulation, scale, start=chunk * width)
            scale_rows(modulation, scale, start=(chunk + 1) * width)
            add_to_bias(modulation, scale - 1, start=(chunk + 1) * width)


def _fold_values(block: nn.Module, scales: Mapping[str, Tensor]) -> tuple[nn.Module, int]:
    """Checks all scales and folds that of the attention's output; norm1.linear, width."""
    modulation, to_v = (block.get_submodule(n) for n in ("norm1.linear", "attn1.to_v"))
    width = cast(int, modulation.out_features) // 6
    inner = cast(int, to_v.out_features)
    for name, scale in scales.items():
        _check_scale(name, scale, inner if name == "attn1.to_out.0" else width)
    if "attn1.to_out.0" not in scales:
        return modulation, width
    if any(isinstance(part, QuantAttention) for part in block.modules()):
        raise CapabilityMissing(
            "A scale for attn1.to_out.0 is folded into to_v, but the attention quantises what "
            "to_v puts out: its range would be another one. Leave this scale to the layer's "
            "own transform, or set model.quantize_attention: false."
        )
    scale_rows(to_v, scales["attn1.to_out.0"])
    return modulation, width


def _check_scale(name: str, scale: Tensor, channels: int) -> None:
    if name not in FOLDABLE:
        raise CapabilityMissing(
            f"A scale for {name!r} cannot be folded in DiT; {', '.join(FOLDABLE)} "
            "can. Apply it to the input when the layer runs (a channel scale of its transform)."
        )
    if tuple(scale.shape) != (channels,):
        raise ConfigError(
            f"The scale for {name} has the shape {list(scale.shape)}; the input has {channels} "
            f"channels. Give a vector [{channels}]."
        )
    if not bool(torch.isfinite(scale).all() and (scale > 0).all()):
        raise NumericsError(
            f"The scale for {name} reaches from {float(scale.min())} to {float(scale.max())}; "
            "it must be positive and finite. Clamp the maxima it is made of (1e-5)."
        )


def _floating_type(linear: nn.Module) -> torch.dtype:
    """Type a linear computes in: that of its bias, which also a quantised one keeps."""
    bias = linear.bias
    return bias.dtype if isinstance(bias, Tensor) else torch.float32
