"""Salient channels: how far the largest input channels of a DiT's linears stand out.

PTQ4DiT (https://arxiv.org/abs/2405.16005) starts from them: few channels of extreme magnitude, in
activations and weights, which share a quantiser with all others.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType

import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor, nn

KINDS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "query_key_value": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
        "attention_output": ("attn1.to_out.0",),
        "feed_forward_up": ("ff.net.0.proj",),
        "feed_forward_down": ("ff.net.2",),
    }
)
"""Kind of linear -> names of the linears of a block that share this input."""

Maxima = dict[str, list[Tensor]]
"""Kind of linear -> largest magnitude of each input channel, [channels], of each block."""


@contextmanager
def recorded_maxima(transformer: DiTTransformer2DModel) -> Iterator[Maxima]:
    """Activations' maxima of all passes through the transformer while the context is open."""
    maxima: Maxima = {kind: [] for kind in KINDS}
    handles = []
    for block in transformer.transformer_blocks:
        for kind, names in KINDS.items():
            linear = block.get_submodule(names[0])
            largest = linear.weight.new_zeros(linear.in_features)
            maxima[kind].append(largest)
            handles.append(linear.register_forward_pre_hook(_keeping_largest(largest)))
    try:
        yield maxima
    finally:
        for handle in handles:
            handle.remove()


def _keeping_largest(largest: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    """Hook that raises `largest` [channels] to the magnitudes of the input."""

    def keep(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen = inputs[0].detach().abs().flatten(0, -2).amax(dim=0)
        torch.maximum(largest, seen, out=largest)

    return keep


@torch.no_grad()
def weight_maxima(transformer: DiTTransformer2DModel) -> Maxima:
    """Largest weight magnitude of each input channel, over all linears that share the input."""
    return {
        kind: [
            torch.cat([block.get_submodule(name).weight for name in names]).abs().amax(dim=0)
            for block in transformer.transformer_blocks
        ]
        for kind, names in KINDS.items()
    }


def salience(maxima: Maxima) -> dict[str, dict[str, float]]:
    """Largest over median channel maximum of each kind: its median and its most over the blocks.

    A kind whose median channel is zero counts as infinite.
    """
    found = {}
    for kind, blocks in maxima.items():
        ratios = torch.stack([each.max() / each.median() for each in blocks])
        found[kind] = {
            "median_block": round(float(ratios.median()), 2),
            "most_salient_block": round(float(ratios.max()), 2),
        }
    return found
