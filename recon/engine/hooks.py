"""What a method may say of itself: a method is a `Reconstruction` that overrides some of these.

In the order of a run: what is recorded, what comes before there are units, how units are cut, then
a unit's stages, its layers, its loss and what learns, and how it closes.
"""

from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from recon.engine.unit import OpenUnit, Stage, Unit
from recon.layers.quant_attention import QuantAttention
from recon.layers.quant_linear import QuantLinear
from recon.models.adapter import ModelAdapter
from recon.quantizers.spec import QuantSpec, Strategy


class Hooks(LightningModule):
    """Every hook of a method, with its default: round-to-nearest, a unit per block, no learning."""

    adapter: ModelAdapter
    weight: QuantSpec
    activation: QuantSpec | None
    softmax_bits: int
    adaln: str
    sample_count: int
    """Calibration samples over all processes."""

    activation_strategies: ClassVar[tuple[Strategy, ...]] = ("token",)
    """What may share a range of activations; for others than token the method finds fixed ones."""
    asymmetric_weights: ClassVar[bool] = False
    """Whether the method finds zero-points of weights."""
    quantize_vision = False
    """Whether the method quantises the network that turns pictures into features."""
    outside_weight: QuantSpec | None = None
    """Grid of the weights of linears outside the blocks; None leaves them as they are."""

    @property
    def wants_gram(self) -> bool:
        """Whether `record.gram` is needed."""
        return False

    @property
    def wants_attention(self) -> bool:
        """Whether `record.salience` is needed; the adapter must then expose its attention."""
        return False

    @property
    def wants_rows(self) -> Literal["timestep", "sample"] | None:
        """Whether `record.absmax_rows` is needed, and what one of its rows is."""
        return None

    @property
    def wants_tokens(self) -> int:
        """How many tokens of each sample `record.tokens` is to keep."""
        return 0

    def prepare(self) -> None:
        """Changes the network before it is cut into units; default: nothing."""

    def preparation(self) -> list[Stage]:
        """Stages before the network is cut into units; default: none.

        Streams stand in front of the first block, no unit is open. What learns in them is what
        `preparation_groups` says, by `preparation_loss`; without it they are searches.
        """
        return []

    def preparation_groups(self) -> list[dict[str, Any]]:
        """As `parameter_groups`, for a stage before there are units."""
        return []

    def preparation_loss(self, sample: int, step: int) -> dict[str, Tensor]:
        """As `unit_loss`, for a sample in a stage before there are units."""
        raise NotImplementedError

    def partition(self) -> list[Unit]:
        """The units, first to last, once `preparation` is done; default: one per block."""
        return [Unit(name, (name,)) for name in self.adapter.block_names]

    def foreseen_units(self) -> list[Unit]:
        """The units as far as the configuration tells, for planning; default: `partition`.

        Where `partition` waits for what `preparation` finds: the cut that takes most memory.
        """
        return self.partition()

    @property
    def further_streams(self) -> int:
        """Boundaries kept beside the carried ones while a unit is open, targets inside it first."""
        return 0

    def unit_stages(self, unit: Unit) -> list[Stage]:
        """What is done to a unit, in order; default: one stage of `unit_steps`."""
        return [Stage("reconstruct", self.unit_steps(self.sample_count))]

    def unit_steps(self, samples: int) -> int:
        """Optimizer steps of a unit, given the number of calibration samples; at least 1."""
        return 1

    def open_stage(self, stage: Stage) -> dict[str, Tensor]:
        """Begins a stage, also one that is continued: what was saved is loaded afterwards.

        Returns:
            What the stage keeps in `stage_state`.
        """
        return {}

    def search_step(self, stage: Stage, step: int) -> dict[str, float]:
        """One step of a stage in which nothing learns; values to be logged."""
        return {}

    def close_stage(self, stage: Stage) -> None:
        """Draws the conclusions of a stage, before its unit (if it is the last) is closed."""

    def open_unit(self, unit: OpenUnit) -> dict[str, QuantLinear]:
        """The quantised layers that stand for the unit's linears, by full name.

        Default: round-to-nearest.
        """
        return {
            name: QuantLinear(module, self.weight, self.activation_spec(group.role))
            for group in unit.groups
            for name, module in group.linears.items()
        }

    def foreseen_layers(self, unit: OpenUnit) -> dict[str, QuantLinear]:
        """Layers with the parts they have when the unit learns; their numbers mean nothing.

        For planning: `unit.record` is random, and there are no streams. Default: `open_unit`.
        """
        return self.open_unit(unit)

    def open_attention(self, name: str, unit: OpenUnit) -> QuantAttention:
        """The quantised products of the attention of that full name.

        Asked for where `quantize_attention` is set. Default: nothing fixed, nothing learned.
        """
        assert self.activation is not None
        return QuantAttention(self.activation, self.softmax_bits)

    def unit_loss(self, student: Tensor, teacher: Tensor, sample: int) -> dict[str, Tensor]:
        """Terms to be added up and minimised, from the unit's tokens [batch, tokens, channels]."""
        raise NotImplementedError

    def regularizer(self, unit: OpenUnit, progress: float) -> dict[str, Tensor]:
        """Terms that depend on no sample; `progress` runs from 0 to 1 within the stage."""
        return {}

    def parameter_groups(self, unit: OpenUnit) -> list[dict[str, Any]]:
        """Optimizer groups of what learns in the open stage; empty where nothing does.

        Each has `name`, `params`, `lr` and `schedule`, which maps progress to a factor of lr.
        """
        return []

    def on_loss(self, loss: Tensor) -> None:
        """Sees the mean loss of each step, before the parameters it belongs to move."""

    def optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """The optimizer over `groups`."""
        return torch.optim.Adam(groups, fused=True)

    def close_outside(self, unit: OpenUnit) -> dict[str, QuantLinear]:
        """Closed layers for linears of stem or head, on the grid `outside_weight`, by full name.

        Asked for where `outside_weight` is set, for each group of one input in turn.

        Args:
            unit: The group, and what was recorded of its input behind the layers closed before.
        """
        raise NotImplementedError

    def close_unit(self, unit: OpenUnit) -> None:
        """Turns every layer of the unit into codes; default: what its rounding says."""
        for layer in unit.layers.values():
            layer.close_as_rounded()

    # Which linears, on which grid

    def activation_spec(self, role: str) -> QuantSpec | None:
        """Grid of the input of linears of that role."""
        return None if role == "modulation" and self.adaln == "w4a16" else self.activation

    @property
    def skip_roles(self) -> tuple[str, ...]:
        """Roles of linears that stay in full precision."""
        return ("modulation",) if self.adaln == "fp" else ()
