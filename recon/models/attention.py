"""An attention of diffusers around any computation of softmax(QKᵀ)V."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from recon.errors import CapabilityMissing

Product = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(query, key, value) -> output, each [batch, heads, tokens, channels]; the query unscaled."""

UNKNOWN = ("norm_q", "norm_k", "spatial_norm", "group_norm", "norm_cross")
"""Parts of an attention that this processor does not run."""


class ProductProcessor(nn.Module):
    """Self-attention without mask, as diffusers' AttnProcessor2_0 computes it, around a product.

    Args:
        product: A module is registered, so that it moves with the network.
    """

    def __init__(self, product: Product) -> None:
        super().__init__()
        self.product = product

    def forward(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Output of the attention, [batch, tokens, channels], from its input of the same shape."""
        linears = (attn.to_q, attn.to_k, attn.to_v)
        query, key, value = (
            linear(hidden_states).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for linear in linears
        )
        merged = self.product(query, key, value).transpose(1, 2).flatten(-2)
        output: Tensor = attn.to_out[1](attn.to_out[0](merged))
        return output


def set_product(attention: Any, product: Product | None) -> None:
    """Lets `product` compute what the attention's kernel did; None: the kernel again.

    Raises:
        CapabilityMissing: The attention has parts that ProductProcessor does not run.
    """
    from diffusers.models.attention_processor import AttnProcessor2_0

    parts = [name for name in UNKNOWN if getattr(attention, name, None)]
    if parts or attention.residual_connection or attention.rescale_output_factor != 1:
        raise CapabilityMissing(
            f"The products of an attention with {', '.join(parts) or 'a residual or rescaling'} "
            "cannot be replaced here. Set model.quantize_attention: false, or write a processor "
            "for it."
        )
    attention.set_processor(AttnProcessor2_0() if product is None else ProductProcessor(product))
