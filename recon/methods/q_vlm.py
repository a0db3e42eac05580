"""Q-VLM (arXiv 2410.08119): vision-language models, block by block of layers that depend.

The paper in its own order, and where each part stands:

    visual encoder               eqs 8-10   `recon.methods.visual_encoder`
    cross-layer dependency       eqs 4-6    `recon.methods.dependency_survey`
    block partition              eq. 7      `partition`; `recon.calibration.partition`
    joint search of clip ranges  eqs 2, 3   `recon.methods.joint_search`
    learned rounding             ours       `unit_loss`; `recon.methods.rounding_behind_search`

The authors' code does none of this as described (NF4 weights, no block objective, no search), so
the paper is what is implemented. A layer is a block of the network. Before there are units, one
stage searches the visual encoder's ranges and one tunes it, if that is asked for, and one walks
over the pairs of neighbouring layers; each unit then has a stage that searches and one that learns.
The block objective never rises: warm start, joint search, learned rounding.
"""

import math
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from recon.calibration.partition import fixed_partition, greedy_partition, optimal_partition
from recon.engine import vision
from recon.engine.activation_sites import ActivationSites, site_names
from recon.engine.searched_layers import nearest, searched_layers
from recon.engine.staged import OpenStage, StagedReconstruction
from recon.engine.unit import OpenUnit, Stage, Unit
from recon.layers.quant_linear import QuantLinear
from recon.layers.rounding import rounding_penalty
from recon.losses.reconstruction import error_and_power
from recon.methods import (
    dependency_survey,
    image_weights,
    joint_search,
    q_vlm_checks,
    rounding_behind_search,
    visual_encoder,
)
from recon.methods.rounding_behind_search import LearnedRounding, accepted_gptq, let_learn
from recon.methods.visual_encoder import TunedEncoder
from recon.methods.visual_encoder_layers import SEARCH_STAGE, encoder_activation
from recon.methods.visual_encoder_search import VisualEncoderSearch
from recon.methods.visual_encoder_tuning import VisualEncoderTuning
from recon.models.capabilities import SeesPictures
from recon.quantizers.spec import QuantSpec, Strategy

LARGEST = 3
"""Layers of a block, at most. Source: Q-VLM, figure 3a."""

PERCENTILES = (1.0, 0.995, 0.99, 0.985, 0.98)
"""Source: Q-VLM, implementation details: 1.0 to 0.98 in steps of 0.005."""

SHRINKS = (1.0, 0.9, 0.8, 0.7, 0.6)
"""Kept shares of a range. Source: quant_modules.py, whose grid goes on to 0.4."""

MAX_LEVELS = 6
"""Bits of the points hidden states are assigned to, at most: the table has 4^bits numbers."""


class QVLM(StagedReconstruction):
    """Layers that depend on each other are quantised together, on their common output.

    Args:
        partition_by: `entropy` joins layers greedily where the proxy exceeds the threshold (eq. 7),
            `dp` maximises what it exceeds it by; controls: `fixed` blocks of `largest`, `layerwise`
            blocks of one.
        proxy: What is taken for the dependency of two neighbours: `entropy` (eq. 4), `quant_error`
            (relative error of the pair's output, both quantised on their initial ranges), `ded`
            (share of the layer-wise error that a joint search removes: true, and dear).
        threshold_quantile: h0 as a quantile of the proxy over all pairs; null: their mean.
        price: κ of `dp`, in units of the proxy per combination tried.
        largest: Layers of a block, 1 to 3.
        eq5_literal: The temperature of eq. 5 as printed, in units of the hidden states.
        audited: Pairs of neighbours, evenly spaced, whose true DED is compared with the proxy.
        search: `product` tries all combinations of one candidate per layer; `coordinate` goes from
            site to site.
        sweeps: Of the coordinate search over all sites.
        grid: `shrink` tries shares of the range, `percentile` two-sided percentiles of a fixed one.
        shrinks: Candidates of `shrink`, widest first.
        percentiles: Candidates of `percentile`, widest first.
        range_tokens: Tokens of each sample that fixed and initial ranges are taken from.
        rounding: What is done to weights behind the search: `signround` learns an offset of each,
            in [-0.5, 0.5], `adaround` up or down, each with ranges; `gptq` passes errors on from
            column to column; `none`: nothing (the paper).
        steps: Optimizer steps of the learning stage.
        lr: Of the rounding; null: 1 / steps, falling linearly to 0 (signround), or 1e-3, constant
            (adaround).
        range_lr: Of the logarithms of activation ranges and weight step sizes (Adam, cosine to 0).
        rounding_weight: Of adaround's regulariser, beside BRECQ's loss. Source: 0.01.
        image_weight: ω of a picture's tokens in the block objective; those of text have 1. `mbq`:
            by the share of the answer's gradient that reaches them (`engine.modality`).
        quantize_vision: Whether the linears of the visual encoder are quantised, their inputs per
            token (Source: Q-VLM, after Outlier Suppression), on searched ranges. The paper does;
            ours leaves it to be asked for: its rounding is learned only where `veo` does so.
        veo: Tuning of the visual encoder, quantised or not, before anything else.
        **kwargs: Arguments of `Reconstruction`.

    Raises:
        ConfigError: A number is out of range.
    """

    activation_strategies: ClassVar[tuple[Strategy, ...]] = ("token", "channel", "tensor")
    initial_norm: ClassVar[float] = 0.5
    """Exponent of the l_p distance that initial ranges minimise. Source: quant_modules.py."""
    learned_change: ClassVar[tuple[float, float]] = (math.log(0.25), math.log(1.5))
    """Bounds of the logarithm of the factor by which a learned range or step size may change."""

    def __init__(
        self,
        partition_by: Literal["entropy", "dp", "fixed", "layerwise"] = "entropy",
        proxy: Literal["entropy", "quant_error", "ded"] = "entropy",
        threshold_quantile: float | None = None,
        price: float = 0.0,
        largest: int = LARGEST,
        eq5_literal: bool = False,
        audited: int = 4,
        search: Literal["product", "coordinate"] = "product",
        sweeps: int = 2,
        grid: Literal["shrink", "percentile"] = "shrink",
        shrinks: tuple[float, ...] = SHRINKS,
        percentiles: tuple[float, ...] = PERCENTILES,
        range_tokens: int = 64,
        rounding: Literal["signround", "adaround", "gptq", "none"] = "signround",
        steps: int = 200,
        lr: float | None = None,
        range_lr: float = 1e-3,
        rounding_weight: float = 0.01,
        image_weight: float | Literal["mbq"] = 1.0,
        quantize_vision: bool = False,
        veo: VisualEncoderTuning = VisualEncoderTuning(),  # noqa: B008 (frozen)
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.partition_by, self.proxy = partition_by, proxy
        self.threshold_quantile, self.price, self.largest = threshold_quantile, price, largest
        self.eq5_literal, self.audited = eq5_literal, audited
        self.search, self.sweeps, self.grid = search, sweeps, grid
        self.shrinks, self.percentiles = tuple(shrinks), tuple(percentiles)
        self.range_tokens, self.rounding, self.steps = range_tokens, rounding, steps
        self.lr, self.range_lr, self.rounding_weight = lr, range_lr, rounding_weight
        self.image_weight, self.quantize_vision, self.veo = image_weight, quantize_vision, veo
        q_vlm_checks.check_numbers(self, LARGEST)
        self.sites = ActivationSites(
            self.shares, percentiles=grid == "percentile", power=self.initial_norm
        )

    def check(self) -> None:
        """See `Reconstruction.check`; also what the grid, ω and the visual encoder need."""
        super().check()
        q_vlm_checks.check_settings(self)

    # Before there are units: the visual encoder (eqs 8-10), dependency (eqs 4-6) ------------------

    def preparation(self) -> list[Stage]:
        """The visual encoder's, if it is touched; ω; the survey, if anything asks for it."""
        parts = (visual_encoder, image_weights, dependency_survey)
        return [stage for part in parts for stage in part.stages(self)]

    @property
    def vision_activation(self) -> QuantSpec | None:
        """See `encoder_activation`."""
        return encoder_activation(self.activation)

    @property
    def levels(self) -> int:
        """M of eq. 5: rounding points that hidden states are assigned to."""
        bits = self.activation.num_bits if self.activation else MAX_LEVELS
        return int(2 ** min(bits, MAX_LEVELS))

    # Partition: eq. 7 -----------------------------------------------------------------------------

    def partition(self) -> list[Unit]:
        """Blocks of at most `largest` layers."""
        names = self.adapter.block_names
        if self.partition_by in ("fixed", "layerwise") or len(names) == 1:
            return self.foreseen_units()
        return self._units(self._cut(self.findings["dependency"][self.proxy]))

    def foreseen_units(self) -> list[Unit]:
        """Blocks of `largest` layers, where the survey has still to cut them."""
        size = 1 if self.partition_by == "layerwise" else self.largest
        return self._units(fixed_partition(len(self.adapter.block_names), size))

    def _units(self, cut: list[range]) -> list[Unit]:
        names = self.adapter.block_names
        units = []
        for block in cut:
            inside = names[block.start : block.stop]
            name = inside[0] if len(inside) == 1 else f"{inside[0]} to {inside[-1]}"
            units.append(Unit(name, inside))
        return units

    def _cut(self, dependency: list[float]) -> list[range]:
        values = torch.tensor(dependency, dtype=torch.float64)
        quantile = self.threshold_quantile
        h0 = float(values.mean() if quantile is None else values.quantile(quantile))
        if self.partition_by == "entropy":
            return greedy_partition(dependency, h0, self.largest)
        return optimal_partition(
            dependency, h0, self.largest, candidates=len(self.shares), price=self.price
        )

    # A unit: weights rounded to nearest, one searched range per input -----------------------------

    @property
    def wants_tokens(self) -> int:
        """Some tokens of each sample, for initial ranges and percentiles."""
        return self.range_tokens if self.activation else 0

    @property
    def further_streams(self) -> int:
        """Targets inside a unit, and outputs of its first layers while it is searched."""
        return 2 * (max(self.largest, 2) - 1)

    def open_unit(self, unit: OpenUnit) -> dict[str, QuantLinear]:
        """Layers rounded to nearest on step sizes of least square error; one range per input."""
        layers: dict[str, QuantLinear] = {}
        for group in unit.groups:
            spec = self.activation_spec(group.role)
            made = None if spec is None else self.sites.add(group, unit.record, spec).range
            layers |= searched_layers(group, self.weight, spec, made, nearest(self.weight))
        return layers

    def foreseen_layers(self, unit: OpenUnit) -> dict[str, QuantLinear]:
        """As they stand when the search has ended, on the narrowest ranges, and rounding learns."""
        unit.layers = self.open_unit(unit)
        last = len(self.shares) - 1
        narrowest = {name: last for names in site_names(self, unit.unit) for name in names}
        if rounding_behind_search.stages(self):
            let_learn(self, unit, narrowest)
        else:
            self.sites.place(unit, narrowest, None)
        return unit.layers

    # Stages: joint search (eqs 2 and 3), then learned rounding (ours) -----------------------------

    def unit_stages(self, unit: Unit) -> list[Stage]:
        """A search of its ranges, if it has any, then learning, if it is asked for."""
        stages = [*joint_search.stages(self, unit), *rounding_behind_search.stages(self)]
        return stages or [Stage("nearest", 1)]

    def begun(self, stage: Stage) -> OpenStage:
        """See `StagedReconstruction.begun`."""
        return STAGES[stage.name](self)

    @property
    def shares(self) -> tuple[float, ...]:
        """Candidates of every activation site, widest first."""
        return self.shrinks if self.grid == "shrink" else self.percentiles

    @property
    def has_choice(self) -> bool:
        """Whether a search has anything to choose between."""
        return self.activation is not None and len(self.shares) > 1

    @property
    def candidates(self) -> dict[str, int]:
        """What searches have chosen so far, by activation site."""
        found: dict[str, int] = self.findings.get("candidates", {})
        return found

    @property
    def stream(self) -> str:
        """What enters units, in the block objective."""
        return "teacher" if self.inputs == "full_precision" else "student"

    def token_weights(self, sample: int, unit: Unit | None = None) -> Tensor | None:
        """ω of a sample's tokens, [batch, tokens], in a unit's objective; None: 1.

        Args:
            sample: Its index.
            unit: None: the open one.
        """
        weight = self.image_weight
        if weight == 1:
            return None
        if weight == "mbq":
            assert unit is not None or self.opened is not None
            blocks = (unit or self.opened.unit).blocks  # type: ignore[union-attr]
            # `plan` times a step of a unit with nothing before it: then ω is not known yet.
            weight = self.findings.get("image_weights", {}).get(blocks[-1], 1.0)
        assert isinstance(self.adapter, SeesPictures)
        image = self.adapter.image_tokens(self.frontier.sample(sample)).to(self.run_device)
        return torch.where(image, weight, 1.0)

    # Learning: the block objective ----------------------------------------------------------------

    def unit_loss(self, student: Tensor, teacher: Tensor, sample: int) -> dict[str, Tensor]:
        """J_B (eq. 3 over the power of the target), estimated from one sample."""
        assert isinstance(self.current, LearnedRounding)
        wrong, _ = error_and_power(student, teacher, self.token_weights(sample))
        return {"block_error": wrong / self.current.power}

    def regularizer(self, unit: OpenUnit, progress: float) -> dict[str, Tensor]:
        """Of adaround; divided by a token's power as J_B is, so that its share is BRECQ's."""
        if self.rounding != "adaround":
            return {}
        assert isinstance(self.current, LearnedRounding)
        penalty = rounding_penalty((q.rounding for q in unit.layers.values()), progress)
        weight = self.rounding_weight / self.current.token_power
        return {} if penalty is None else {"round": weight * penalty}

    def preparation_loss(self, sample: int, step: int) -> dict[str, Tensor]:
        """Eq. 10 of one sample."""
        assert isinstance(self.current, TunedEncoder)
        assert self.stage_state is not None
        return self.current.terms(sample, step, self.stage_state)

    # Closing --------------------------------------------------------------------------------------

    @property
    def wants_gram(self) -> bool:
        """The teacher's Hessian comes with the pass that records targets."""
        return self.rounding == "gptq" and self.inputs == "full_precision"

    def close_unit(self, unit: OpenUnit) -> None:
        """Codes as they are rounded; with `gptq` its own, if the block objective is not worse."""
        codes = accepted_gptq(self, unit) if self.rounding == "gptq" else {}
        for name, layer in unit.layers.items():
            weight = layer.fold()
            assert layer.rounding is not None
            rounded, scale = layer.rounding.close(weight)
            layer.close(codes.get(name, rounded), scale)


STAGES: dict[str, Callable[[QVLM], OpenStage]] = {
    SEARCH_STAGE: VisualEncoderSearch,
    vision.STAGE: visual_encoder.open_encoder,
    image_weights.STAGE: image_weights.ImageWeights,
    dependency_survey.STAGE: dependency_survey.DependencySurvey,
    joint_search.STAGE: joint_search.JointSearch,
    rounding_behind_search.STAGE: LearnedRounding,
    "nearest": lambda method: OpenStage(),
}
"""What is done in the stage of that name, in the order of a run."""
