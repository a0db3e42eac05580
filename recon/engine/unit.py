"""Units and what is at hand while one of them is open."""

from dataclasses import dataclass

from torch import nn

from recon.calibration.statistics import UnitRecord
from recon.layers.quant_linear import QuantLinear


@dataclass(frozen=True)
class Unit:
    """Consecutive blocks that are optimised together; one stage, one epoch."""

    name: str
    blocks: tuple[str, ...]


@dataclass(frozen=True)
class LayerGroup:
    """Linears of the open unit that receive the same input.

    `linears` maps full dotted names (`transformer_blocks.0.attn1.to_q`) to the teacher's layers.
    """

    name: str
    """Name of the first linear; the key of the group's statistics."""
    role: str
    linears: dict[str, nn.Linear]


@dataclass
class OpenUnit:
    """The unit that learns: its layers, what was recorded, and its quantised blocks."""

    unit: Unit
    groups: list[LayerGroup]
    teacher_blocks: list[nn.Module]
    record: UnitRecord
    layers: dict[str, QuantLinear]
    """Filled from what the method's `open_unit` returns, by full dotted name."""
    student_blocks: list[nn.Module]
    """Copies of the teacher's blocks around `layers`; everything else is shared."""
