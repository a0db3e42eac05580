"""Parts of a DiT of diffusers: their names, and modules that stand in for what is elsewhere."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from recon.models.adapter import InputGroup
from recon.types import State

BLOCKS = "transformer_blocks"

EMBEDDER = "norm1.emb"
"""Where a block of diffusers keeps an embedder of its own, of timestep and class."""

GROUPS = (
    InputGroup(("norm1.linear",), "modulation"),
    InputGroup(("attn1.to_q", "attn1.to_k", "attn1.to_v"), "attention_input"),
    InputGroup(("attn1.to_out.0",), "attention_output"),
    InputGroup(("ff.net.0.proj",), "feed_forward_up"),
    InputGroup(("ff.net.2",), "feed_forward_down"),
)
"""Linears of a block in call order. Source: PTQ4DiT, figure 7."""

PATCHES = "pos_embed.proj"
"""The convolution that makes tokens of patches."""

TIMESTEP_LINEARS = tuple(f"{EMBEDDER}.timestep_embedder.linear_{number}" for number in (1, 2))
"""Linears of an embedder, by their names in a block, in call order."""

HEAD = (InputGroup(("proj_out_1",), "modulation"), InputGroup(("proj_out_2",), "output"))
"""Linears behind the blocks: of the last scale and shift, and of the output."""


class CarriedConditioning(nn.Module):
    """Stands where a block has its embedder and gives back what the state carries."""

    position: Tensor

    def __init__(self) -> None:
        super().__init__()
        # A tensor: a number would make every block another program to torch.compile.
        self.register_buffer("position", torch.zeros(1, dtype=torch.long), persistent=False)

    def forward(self, conditioning: Tensor, *unused: Any, **also_unused: Any) -> Tensor:
        """One embedder's share [batch, channels] of [batch, embedders, channels]."""
        return conditioning.index_select(1, self.position).squeeze(1)


class Embedding(nn.Module):
    """Stands where a block was and has its embedder, at the block's name for it."""

    def __init__(self, embedder: nn.Module) -> None:
        super().__init__()
        self.norm1 = nn.ModuleDict({"emb": embedder})


class Injector(nn.Module):
    """Stands for all blocks: puts out a stream, and embeds as the first block would."""

    def __init__(self, state: State) -> None:
        super().__init__()
        self.stream = state["hidden_states"]
        conditioning = state["conditioning"][:, 0]
        self.norm1 = SimpleNamespace(emb=lambda *unused, **also_unused: conditioning)

    def forward(self, *unused: Any, **also_unused: Any) -> Tensor:
        """The stream, whatever goes in."""
        return self.stream
