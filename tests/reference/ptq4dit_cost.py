"""What the authors' code of PTQ4DiT (arXiv 2405.16005) costs, as its algorithm is written.

Its units are the patch embedding, two linears of the timestep embedder, L blocks and the final
layer, in this order. For every unit it runs the full-precision network and the quantised one from
the latents up to that unit, writes what enters and what leaves the unit in float32 to disk, and at
the end saves the float32 rounding logit of every quantised weight.
"""

from dataclasses import dataclass

FLOAT = 4
"""Bytes of a float32."""


@dataclass(frozen=True)
class Geometry:
    """A DiT and its calibration set."""

    blocks: int
    width: int
    tokens: int
    latent: int
    """Numbers of one latent: channels times height times width."""
    output: int
    """Numbers that leave the final layer per token: patch area times output channels."""
    classes: int
    weights: int
    """Quantised weights of the whole network, one timestep embedder."""
    rows: int
    """Calibration rows: conditional and null ones."""


def block_forwards(blocks: int) -> int:
    """Forwards of a single block for a row: both networks up to every unit, that unit included."""
    before_or_in_each_unit = [0, 0, 0, *range(1, blocks + 1), blocks]
    return sum(2 * count for count in before_or_in_each_unit)


def activation_bytes(net: Geometry) -> int:
    """Bytes written to disk for all units: each one's inputs, conditioning included, and output."""
    stream = net.tokens * net.width
    per_row = [
        net.latent + stream,  # patch embedding
        256 + net.width,  # first linear, from 256 frequencies
        net.width + net.width,  # second linear
        *[stream + net.width + stream] * net.blocks,
        stream + net.width + net.tokens * net.output,  # final layer
    ]
    return FLOAT * net.rows * sum(per_row)


def checkpoint_bytes(net: Geometry) -> int:
    """Bytes of the one file saved at the end: rounding logits, embedding table, positions.

    It holds neither weights nor biases: the original checkpoint is needed beside it.
    """
    table, positions = (net.classes + 1) * net.width, net.tokens * net.width
    return FLOAT * (net.weights + table + positions)
