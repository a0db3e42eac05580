"""Units, stages, and what is at hand while one of them is open."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor, nn

from recon.calibration.statistics import UnitRecord
from recon.layers.quant_attention import QuantAttention
from recon.layers.quant_linear import QuantLinear
from recon.layers.transform import InputTransform


@dataclass(frozen=True)
class Unit:
    """Consecutive blocks that are optimised together, in one or more stages."""

    name: str
    blocks: tuple[str, ...]


@dataclass(frozen=True)
class Stage:
    """One epoch: what is done to the open unit, or to the network before it is cut into units."""

    name: str
    steps: int
    """Optimizer steps; where nothing learns, steps of a search. At least 1."""


class StageState(nn.Module):
    """What an open stage has found so far, beside the layers: tensors that checkpoints hold."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name.replace(".", "/"), tensor)

    def __getitem__(self, name: str) -> Tensor:
        return self.get_buffer(name.replace(".", "/"))


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
    layers: dict[str, QuantLinear] = field(default_factory=dict)
    """What the method's `open_unit` returned, by full dotted name."""
    attentions: dict[str, QuantAttention] = field(default_factory=dict)
    """Quantised attention products by full dotted name; empty where they are not quantised."""
    student_blocks: list[nn.Module] = field(default_factory=list)
    """Copies of the teacher's blocks around `layers`; everything else is shared."""
    losses: dict[str, Tensor] = field(default_factory=dict)
    """`first` and `last` loss seen by this process."""
    results: dict[str, float] = field(default_factory=dict)
    """What stages found, to be logged when the unit is closed."""
    started: float = 0.0
    """Monotonic seconds."""

    @cached_property
    def transforms(self) -> list[InputTransform]:
        """The distinct input transforms of the layers."""
        found = (layer.transform for layer in self.layers.values())
        return list(dict.fromkeys(t for t in found if t is not None))

    def note_loss(self, loss: Tensor) -> None:
        """Remembers the first and the newest loss, without asking the device for them."""
        self.losses.setdefault("first", loss)
        self.losses["last"] = loss
