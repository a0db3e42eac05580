"""Quantised attention products in, and out of, the blocks of a network."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from recon.errors import CapabilityMissing
from recon.layers.quant_attention import QuantAttention
from recon.models.adapter import ModelAdapter
from recon.models.capabilities import ReplacesAttention, missing_attributes

if TYPE_CHECKING:
    from recon.engine.reconstruction import Reconstruction


def replaceable(adapter: ModelAdapter) -> ReplacesAttention:
    """The adapter, as one whose attention products can be replaced.

    Raises:
        CapabilityMissing: It does not let them be.
    """
    if not isinstance(adapter, ReplacesAttention):
        raise CapabilityMissing(
            f"model.quantize_attention replaces the attention's products, which "
            f"{type(adapter).__name__} does not let be replaced. Implement "
            f"{', '.join(missing_attributes(adapter, ReplacesAttention))}, or set "
            "model.quantize_attention: false."
        )
    return adapter


def quantized_names(module: "Reconstruction", blocks: Sequence[str]) -> list[str]:
    """Full names of the attentions in these blocks whose products are quantised."""
    if not module.quantize_attention:
        return []
    adapter = replaceable(module.adapter)
    return [f"{block}.{name}" for block in blocks for name in adapter.attentions(block)]


def nearest_attentions(
    module: "Reconstruction", blocks: Sequence[str]
) -> dict[str, QuantAttention]:
    """Products on the ranges of each call, by full name: the yardstick."""
    names = quantized_names(module, blocks)
    assert module.activation is not None or not names
    return {
        name: QuantAttention(module.activation, module.softmax_bits)
        for name in names
        if module.activation is not None
    }


def adopted_attentions(
    module: "Reconstruction", blocks: Sequence[str], saved: Mapping[str, Tensor]
) -> dict[str, QuantAttention]:
    """Closed products rebuilt from saved tensors, `<attention>.<tensor>` with the full name."""
    return {
        name: QuantAttention.closed(own(saved, name), made.activation, made.softmax_bits)
        for name, made in nearest_attentions(module, blocks).items()
    }


def own(saved: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """The tensors below a name, without it."""
    prefix = f"{name}."
    return {k.removeprefix(prefix): v for k, v in saved.items() if k.startswith(prefix)}


def put_in(
    adapter: ModelAdapter, whole: nn.Module, attentions: Mapping[str, nn.Module], within: str = ""
) -> None:
    """Lets each of `attentions` compute the products of the attention of its name, in place.

    Args:
        adapter: Of the network.
        whole: A network, or a block.
        attentions: By full name.
        within: Name of `whole` in the network and a dot, empty for the network; others' attentions
            are passed over.
    """
    for name, attention in attentions.items():
        if name.startswith(within):
            inner = name.removeprefix(within)
            replaceable(adapter).replace_attention(whole, inner, attention)
