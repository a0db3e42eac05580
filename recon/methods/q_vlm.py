"""Q-VLM (arXiv 2410.08119): vision-language models, block by block of layers that depend.

The paper in its own order, and where each part stands:

    visual encoder               eqs 8-10   `open_vision`; `recon.methods.visual_encoder`
    cross-layer dependency       eqs 4-6    `survey`; `recon.calibration.dependency`
    block partition              eq. 7      `partition`; `recon.calibration.partition`
    joint search of clip ranges  eqs 2, 3   `search_step`; `recon.calibration.search`
    learned rounding             ours       `unit_loss`, `parameter_groups`, `accept`

The authors' code does none of this as described (NF4 weights, no block objective, no search), so
the paper is what is implemented. A layer is a block of the network. Before there are units, one
stage searches the visual encoder's ranges and one tunes it, if that is asked for, and one walks
over the pairs of neighbouring layers; each unit then has a stage that searches and one that learns.
The block objective never rises: warm start, joint search, learned rounding.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from recon.calibration.dependency import conditional_entropy
from recon.calibration.partition import fixed_partition, greedy_partition, optimal_partition
from recon.calibration.search import CoordinateSearch, ProductSearch, SearchPlan
from recon.calibration.selection import rank_correlation
from recon.calibration.statistics import UnitRecord
from recon.engine import keep_best, vision, walk
from recon.engine.activation_sites import ActivationSites
from recon.engine.assembly import linear
from recon.engine.modality import image_weights
from recon.engine.pairs import pair_histogram
from recon.engine.prefixes import Prefixes, target_power, unit_error
from recon.engine.reconstruction import Reconstruction
from recon.engine.unit import LayerGroup, OpenUnit, Stage, StageState, Unit
from recon.errors import ConfigError
from recon.layers.quant_linear import QuantLinear
from recon.layers.rounding import AdaptiveRounding, OffsetRounding, Rounding, rounding_penalty
from recon.layers.static_range import StaticRange
from recon.layers.token_range import TokenRange
from recon.layers.transform import InputTransform
from recon.losses.reconstruction import error_and_power
from recon.methods import visual_encoder_search
from recon.methods.visual_encoder import VisualEncoderStage, VisualEncoderTuning
from recon.methods.visual_encoder_search import VisualEncoderSearch
from recon.models.adapter import SeesPictures
from recon.quantizers.affine import absmax_scale, check_group_size, dequantize, weight_range
from recon.quantizers.gptq import gptq_codes
from recon.quantizers.ranges import mse_clip_ratio
from recon.quantizers.spec import QuantSpec, Strategy

LARGEST = 3
"""Layers of a block, at most. Source: Q-VLM, figure 3a."""

PERCENTILES = (1.0, 0.995, 0.99, 0.985, 0.98)
"""Source: Q-VLM, implementation details: 1.0 to 0.98 in steps of 0.005."""

SHRINKS = (1.0, 0.9, 0.8, 0.7, 0.6)
"""Kept shares of a range. Source: quant_modules.py, whose grid goes on to 0.4."""

NORM = 0.5
"""Exponent of the l_p distance that initial ranges minimise. Source: quant_modules.py."""

CHANGE = (math.log(0.25), math.log(1.5))
"""Bounds of the logarithm of the factor by which a learned range or step size may change."""

MAX_LEVELS = 6
"""Bits of the points hidden states are assigned to, at most: the table has 4^bits numbers."""

MakeRounding = Callable[[Tensor, Tensor], Rounding]
"""Of a weight and its step sizes."""

SIGN = {"betas": (0.0, 0.0), "eps": 1e-20}
"""Adam without memory is g / |g|: SignSGD. The square of 1e-20 is zero, and 0 / eps no step."""


class QVLM(Reconstruction):
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
            ours leaves it out, because nothing learns the encoder's rounding.
        veo: Tuning of the visual encoder, quantised or not, before anything else.
        **kwargs: Arguments of `Reconstruction`.

    Raises:
        ConfigError: A number is out of range.
    """

    activation_strategies: ClassVar[tuple[Strategy, ...]] = ("token", "channel", "tensor")

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
        self._check_numbers()
        self._sites = ActivationSites(self._shares, percentiles=grid == "percentile", power=NORM)
        self._prefixes: Prefixes | None = None
        self._encoder_search: VisualEncoderSearch | None = None
        self._encoder: VisualEncoderStage | None = None
        self._power = self._token_power = 1.0

    def check(self) -> None:
        """See `Reconstruction.check`; also what the grid and ω need."""
        super().check()
        spec = self.activation
        if self.grid == "percentile" and (spec is None or spec.strategy == "token"):
            raise ConfigError(
                "model.grid is percentile, but ranges of tokens are taken at run time and have no "
                "percentiles. Set model.grid: shrink, or model.activation.strategy: channel."
            )
        if self.image_weight != 1:
            setting = f"model.image_weight is {self.image_weight}"
            vision.sees_pictures(self.adapter, setting, "set it to 1")
        if self.quantize_vision or self.veo.enabled:
            self._check_vision()

    def _check_vision(self) -> None:
        asked = "quantize_vision" if self.quantize_vision else "veo.enabled"
        adapter = vision.sees_pictures(self.adapter, f"model.{asked} is true", "set it to false")
        if self.quantize_vision:
            empty = self.adapter.empty_network()
            for name in (name for names in vision.full_groups(adapter) for name in names):
                check_group_size(linear(empty, name).in_features, self.weight)
        there = {
            "act_ranges": self.quantize_vision and self.activation is not None,
            "norms": bool(adapter.vision_norms()),
            "weight_scales": self.quantize_vision,
            "weights": True,
        }
        if self.veo.enabled and not any(there[part] for part in self.veo.params):
            raise ConfigError(
                f"model.veo is to tune {', '.join(self.veo.params)}, and the visual encoder has "
                f"none: model.quantize_vision is {str(self.quantize_vision).lower()}, and it has "
                f"{len(adapter.vision_norms())} norms. Set quantize_vision: true, or add norms or "
                "weights to veo.params."
            )

    # The visual encoder: eqs 8-10 -----------------------------------------------------------------

    @property
    def vision_activation(self) -> QuantSpec | None:
        """The bits of all activations, each token on its own range."""
        spec = self.activation
        if spec is None or spec.strategy == "token":
            return spec
        return QuantSpec(
            num_bits=spec.num_bits,
            strategy="token",
            dynamic=True,
            scale_denominator=spec.scale_denominator,
        )

    @property
    def _vision_sites(self) -> ActivationSites:
        return ActivationSites(self.shrinks, percentiles=False, power=NORM)

    @property
    def encoder_epoch(self) -> int:
        """Steps of a pass over the calibration set, in the visual encoder's stage."""
        return max(self.sample_count // self.batch_size, 1)

    def open_vision(
        self,
        groups: list[LayerGroup],
        record: UnitRecord,
        sites: ActivationSites,
        *,
        learning: bool = False,
    ) -> dict[str, QuantLinear]:
        """Layers of the visual encoder, as `open_unit`, on the ranges that its search chose.

        Args:
            groups: Its linears.
            record: Of their inputs.
            sites: Takes up the ranges.
            learning: Whether what `veo` names is to learn.
        """
        tuned = self.veo.params if learning and self.veo.enabled else ()
        chosen = self.findings.get(visual_encoder_search.STAGE, {}).get("candidates", {})
        spec = self.vision_activation
        layers: dict[str, QuantLinear] = {}
        for group in groups:
            made: TokenRange | StaticRange | None = None
            if spec is not None:
                site = sites.add(group, record, spec)
                candidate = chosen.get(group.name, sites.initial([group.name])[0])
                made = site.restart(candidate, CHANGE if "act_ranges" in tuned else None)
            layers |= self._layers(
                group,
                spec,
                made,
                lambda weight, scale: OffsetRounding(
                    weight,
                    scale,
                    self.weight,
                    bounds=CHANGE if "weight_scales" in tuned else None,
                    learn_offset=False,
                ),
            )
        if "weights" in tuned:
            for layer in layers.values():
                assert layer.teacher_weight is not None
                layer.teacher_weight = nn.Parameter(layer.teacher_weight.float().clone())
        return layers

    def preparation_groups(self) -> list[dict[str, Any]]:
        """Of the visual encoder, while it is tuned."""
        if self._encoder is None or not self.veo.enabled:
            return []
        rates = {"encoder": self.veo.lr, "encoder weights": self.veo.weight_lr}
        return [
            {"name": name, "params": parameters, "lr": rates[name], "schedule": _cosine}
            for name, parameters in self._encoder.parts.items()
            if parameters
        ]

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Lightning: before each step; the visual encoder's stage looks at where it stands."""
        if self._encoder is not None and self.veo.enabled and self.stage_state is not None:
            found = self._encoder.begin(batch_idx, self.stage_state)
            self.log_dict({f"recon/{name}": v for name, v in found.items()}, batch_size=1)

    def preparation_loss(self, sample: int, step: int) -> dict[str, Tensor]:
        """Eq. 10 of one sample."""
        assert self._encoder is not None
        assert self.stage_state is not None
        return self._encoder.terms(sample, step, self.stage_state)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Lightning: as the trainer says, and within `veo.clip` for the visual encoder."""
        super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
        if self._encoder is not None:
            nn.utils.clip_grad_norm_(self._trained, self.veo.clip)

    # Dependency of neighbours: eqs 4-6 ------------------------------------------------------------

    def preparation(self) -> list[Stage]:
        """The visual encoder's, if it is touched; ω; then one step per pair of neighbours.

        The last unless nothing asks for their dependency.
        """
        pairs = len(self.adapter.block_names) - 1
        wanted = self.partition_by in ("entropy", "dp") or self.audited > 0
        survey = [Stage("dependency", pairs)] if wanted and pairs else []
        weights = [Stage("image_weights", 1)] if self.image_weight == "mbq" else []
        steps = self.veo.epochs * self.encoder_epoch if self.veo.enabled else 1
        seen = self.quantize_vision or self.veo.enabled
        search = self.quantize_vision and self.activation is not None
        encoder = [Stage(vision.STAGE, steps)] if seen else []
        if search:
            tries = 1 + visual_encoder_search.plan(self).steps
            encoder.insert(0, Stage(visual_encoder_search.STAGE, tries))
        return [*encoder, *weights, *survey]

    @property
    def levels(self) -> int:
        """M: rounding points that hidden states are assigned to."""
        bits = self.activation.num_bits if self.activation else MAX_LEVELS
        return int(2 ** min(bits, MAX_LEVELS))

    @property
    def _audited_pairs(self) -> list[int]:
        pairs = len(self.adapter.block_names) - 1
        if self.proxy == "ded":
            return list(range(pairs))
        count = min(self.audited, pairs)
        return sorted(set(torch.linspace(0, pairs - 1, count).round().int().tolist()))

    def survey(self, pair: int, state: StageState) -> dict[str, float]:
        """Joint histogram of a pair of neighbours, and what a trial of quantising them shows."""
        walk.follow(self, pair)
        unit = Unit(f"pair {pair}", self.adapter.block_names[pair : pair + 2])
        if self.proxy == "quant_error" or pair in self._audited_pairs:
            for name, value in self._trial(walk.trial_unit(self, unit), pair).items():
                state[name][pair] = value
        else:
            self.frontier.record(walk.blocks_of(self, unit), inner=True)
        table = pair_histogram(self, self.levels, NORM, literal=self.eq5_literal)
        state["histogram"][pair] = table
        return {"dependency": float(conditional_entropy(table.sum(0)))}

    def _trial(self, pair: OpenUnit, number: int) -> dict[str, float]:
        """What quantising a pair of layers costs on full-precision inputs: proxies, true DED."""
        sites = self._sites_of(pair.unit)
        prefixes = self._prefixes_of(pair, "teacher")
        found = {}
        if self.proxy == "quant_error":
            initial = tuple(self._sites.initial(names) for names in sites)
            found["quant_error"] = prefixes.error(initial)
        if number in self._audited_pairs:
            plan = ProductSearch([len(names) for names in sites], len(self._shares))
            errors = torch.full((plan.steps,), torch.inf, dtype=torch.float64)
            for step in range(plan.steps):
                errors[step] = prefixes.error(plan.settings(step, errors))
            outcome = plan.outcome(errors)
            found["ded"] = 1 - outcome.joint_error / outcome.warm_error
        return found

    def _conclude_survey(self, state: StageState) -> None:
        tables = state["histogram"].cpu()
        found: dict[str, Any] = {"entropy": conditional_entropy(tables.sum(1)).tolist()}
        if isinstance(self.adapter, SeesPictures):
            for kind, name in enumerate(("entropy_image", "entropy_text")):
                found[name] = conditional_entropy(tables[:, kind]).tolist()
        for name in ("quant_error", "ded"):
            values = state[name].cpu()
            if not values.isinf().all():
                found[name] = [None if math.isinf(v) else v for v in values.tolist()]
        if self._audited_pairs:
            pairs = torch.tensor(self._audited_pairs)
            proxy = torch.tensor(found[self.proxy], dtype=torch.float64)[pairs]
            found["spearman"] = rank_correlation(proxy, state["ded"].cpu()[pairs])
            rank_zero_info(
                f"Spearman's correlation of {self.proxy} and the true dependency over "
                f"{len(pairs)} pairs of layers: {found['spearman']}."
            )
        self.findings["dependency"] = found

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
            dependency, h0, self.largest, candidates=len(self._shares), price=self.price
        )

    # Opening a unit: weights rounded to nearest, one range per input ------------------------------

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
            made = None if spec is None else self._sites.add(group, unit.record, spec).range
            layers |= self._layers(group, spec, made, self._nearest)
        return layers

    def _layers(
        self,
        group: LayerGroup,
        spec: QuantSpec | None,
        made: TokenRange | StaticRange | None,
        rounding: MakeRounding,
    ) -> dict[str, QuantLinear]:
        token = made if isinstance(made, TokenRange) else None
        fixed = InputTransform(None, static=made) if isinstance(made, StaticRange) else None
        layers = {}
        for name, module in group.linears.items():
            weight = module.weight.float()
            layers[name] = QuantLinear(
                module,
                self.weight,
                spec,
                transform=fixed,
                rounding=rounding(weight, self._scale(weight)),
                activation_range=token,
            )
        return layers

    def foreseen_layers(self, unit: OpenUnit) -> dict[str, QuantLinear]:
        """As they stand when the search has ended and rounding is learned."""
        unit.layers = self.open_unit(unit)
        if self.rounding != "none":
            self._round(unit, self._learned_rounding)
            widest = {name: 0 for names in self._sites_of(unit.unit) for name in names}
            self._sites.place(unit, widest, CHANGE)
        return unit.layers

    def _scale(self, weight: Tensor) -> Tensor:
        ratio = mse_clip_ratio(weight, self.weight)
        return absmax_scale(weight_range(weight, self.weight) * ratio, self.weight)

    def _nearest(self, weight: Tensor, scale: Tensor) -> Rounding:
        return OffsetRounding(weight, scale, self.weight)

    def _sites_of(self, unit: Unit) -> list[list[str]]:
        """Names of the activation sites of each layer of a unit."""
        return [
            [
                f"{block}.{group.linears[0]}"
                for group in self.adapter.input_groups(block)
                if group.role not in self.skip_roles and self.activation_spec(group.role)
            ]
            for block in unit.blocks
        ]

    @property
    def _shares(self) -> tuple[float, ...]:
        return self.shrinks if self.grid == "shrink" else self.percentiles

    # Stages ---------------------------------------------------------------------------------------

    def unit_stages(self, unit: Unit) -> list[Stage]:
        """A search of its ranges, if it has any, then learning, if it is asked for."""
        stages = [Stage("search", self._plan(unit).steps)] if any(self._sites_of(unit)) else []
        if self.rounding in ("signround", "adaround"):
            stages.append(Stage("rounding", self.steps))
        return stages or [Stage("nearest", 1)]

    def open_stage(self, stage: Stage) -> dict[str, Tensor]:
        """See `Reconstruction.open_stage`."""
        if stage.name == vision.STAGE:
            self._encoder = VisualEncoderStage(self, self._vision_sites, NORM)
            return self._encoder.state()
        if stage.name == visual_encoder_search.STAGE:
            self._encoder_search = VisualEncoderSearch(self, self._vision_sites)
            return self._encoder_search.state()
        if stage.name == "image_weights":
            return {"weights": torch.zeros(len(self.adapter.block_names))}
        if stage.name == "dependency":
            unknown = torch.full((stage.steps,), torch.inf, dtype=torch.float64)
            tables = torch.zeros(stage.steps, 2, self.levels, self.levels, dtype=torch.float64)
            return {"histogram": tables, "quant_error": unknown, "ded": unknown.clone()}
        assert self.opened is not None
        if stage.name == "search":
            self._prefixes = self._prefixes_of(self.opened, self._stream)
            errors = torch.full((stage.steps,), torch.inf, dtype=torch.float64)
            return {"errors": errors, "forwards": torch.zeros((), dtype=torch.int64)}
        return self._open_rounding(self.opened) if stage.name == "rounding" else {}

    def search_step(self, stage: Stage, step: int) -> dict[str, float]:
        """One evaluation of the joint search, or of what comes before there are units."""
        assert self.stage_state is not None
        if self._encoder_search is not None:
            return self._encoder_search.step(step, self.stage_state)
        if self._encoder is not None:
            return self._encoder.measure(self.stage_state)
        if stage.name == "image_weights":
            weights = self.stage_state["weights"].copy_(image_weights(self))
            return {"image_weight": float(weights.mean())}
        if stage.name == "dependency":
            return self.survey(step, self.stage_state)
        if stage.name == "search":
            assert self.opened is not None
            return self.search_candidate(self.opened, step, self.stage_state)
        return {}

    def close_stage(self, stage: Stage) -> None:
        """See `Reconstruction.close_stage`."""
        assert self.stage_state is not None
        if self._encoder_search is not None:
            self.findings[stage.name] = self._encoder_search.conclude(self.stage_state)
            self._encoder_search = None
        elif self._encoder is not None:
            self.findings[vision.STAGE] = self._encoder.close(self.stage_state)
            self._encoder = None
        elif stage.name == "image_weights":
            found = self.stage_state["weights"].tolist()
            self.findings[stage.name] = dict(zip(self.adapter.block_names, found, strict=True))
        elif stage.name == "dependency":
            self._conclude_survey(self.stage_state)
        elif self.opened is not None and stage.name == "search":
            self._conclude_search(self.opened, self.stage_state)
        elif self.opened is not None and stage.name == "rounding":
            self.accept(self.opened, self.stage_state)

    # Joint search: eqs 2 and 3 --------------------------------------------------------------------

    def search_candidate(self, unit: OpenUnit, step: int, state: StageState) -> dict[str, float]:
        """Error of one layer's output under the candidates of this step."""
        plan, prefixes = self._plan(unit.unit), self._prefixes
        assert prefixes is not None
        known = state["errors"].cpu()
        if step and not prefixes.started:  # continued: what the step before left is made again
            prefixes.error(plan.settings(step - 1, known))
        before = prefixes.forwards
        error = prefixes.error(plan.settings(step, known))
        state["errors"][step] = error
        state["forwards"].add_(prefixes.forwards - before)
        return {"candidate_error": error}

    def _conclude_search(self, unit: OpenUnit, state: StageState) -> None:
        """Takes the joint optimum, which is never worse than the warm start."""
        outcome = self._plan(unit.unit).outcome(state["errors"].cpu())
        assert outcome.joint_error <= outcome.warm_error
        unit.results |= {
            "block_error_warm": outcome.warm_error,
            "block_error_joint": outcome.joint_error,
            "search_forwards": float(state["forwards"]),
        }
        chosen = self.findings.setdefault("candidates", {})
        for names, setting in zip(self._sites_of(unit.unit), outcome.joint, strict=True):
            chosen |= dict(zip(names, setting, strict=True))
        self._prefixes = None
        self._rest(unit)

    def _plan(self, unit: Unit) -> SearchPlan:
        sites = [len(names) for names in self._sites_of(unit)]
        if self.search == "product":
            return ProductSearch(sites, len(self._shares))
        return CoordinateSearch(sites, len(self._shares), self.sweeps)

    def _prefixes_of(self, unit: OpenUnit, stream: str) -> Prefixes:
        sites = self._sites_of(unit.unit)
        for layer in unit.layers.values():
            assert layer.teacher_weight is not None
            layer.keep_resident(layer.teacher_weight.dtype)
        return Prefixes(
            self.frontier,
            unit.student_blocks,
            stream,
            lambda layer, setting: self._sites.select(sites[layer], setting),
            partial(self.token_weights, unit=unit.unit),
        )

    @property
    def _stream(self) -> str:
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
            weight = self.findings["image_weights"][blocks[-1]]
        assert isinstance(self.adapter, SeesPictures)
        image = self.adapter.image_tokens(self.frontier.sample(sample)).to(self.run_device)
        return torch.where(image, weight, 1.0)

    def _rest(self, unit: OpenUnit) -> None:
        """Nothing learns: weights rounded to nearest, ranges as the search left them."""
        self._round(unit, self._nearest)
        self._sites.place(unit, self.findings.get("candidates", {}), None)

    @staticmethod
    def _round(unit: OpenUnit, rounding: MakeRounding) -> None:
        for layer in unit.layers.values():
            assert isinstance(layer.rounding, OffsetRounding | AdaptiveRounding)
            layer.rounding = rounding(layer.transformed_weight(), layer.rounding.step)
            layer.resident_weight = None

    # GPTQ behind the search: ours -----------------------------------------------------------------

    @property
    def wants_gram(self) -> bool:
        """The teacher's Hessian comes with the pass that records targets."""
        return self.rounding == "gptq" and self.inputs == "full_precision"

    def close_unit(self, unit: OpenUnit) -> None:
        """Codes as they are rounded; with `gptq` its own, if the block objective is not worse."""
        codes = self._gptq(unit) if self.rounding == "gptq" else {}
        for name, layer in unit.layers.items():
            weight = layer.fold()
            assert layer.rounding is not None
            rounded, scale = layer.rounding.close(weight)
            layer.close(codes.get(name, rounded), scale)

    @torch.no_grad()
    def _gptq(self, unit: OpenUnit) -> dict[str, Tensor]:
        """GPTQ's codes of each layer on the step sizes it has; none where they are refused."""
        before = self._objective(unit)
        record = unit.record if self.wants_gram else walk.record_student(self, unit)
        found = {}
        for group in unit.groups:
            for name in group.linears:
                layer = unit.layers[name]
                weight = layer.transformed_weight()
                assert layer.rounding is not None
                scale = layer.rounding.scale(weight)
                found[name] = gptq_codes(weight, record.gram[group.name], scale, self.weight)
                layer.resident_weight = dequantize(found[name], scale, self.weight)
        after = unit_error(self.frontier, unit.student_blocks, self._stream, self.token_weights)
        for layer in unit.layers.values():
            layer.resident_weight = None
        self._note(unit, before, after, "GPTQ")
        return found if after <= before else {}

    # Learned rounding and ranges on the same objective: ours --------------------------------------

    def _open_rounding(self, unit: OpenUnit) -> dict[str, Tensor]:
        self._objective(unit)
        self._round(unit, self._learned_rounding)
        self._sites.place(unit, self.findings.get("candidates", {}), CHANGE)
        power, tokens = target_power(self.frontier, self.token_weights)
        self._power, self._token_power = power / self.sample_count, power / tokens
        return keep_best.best_so_far(self._learned(unit)) if self.rounding == "signround" else {}

    def _learned_rounding(self, weight: Tensor, scale: Tensor) -> Rounding:
        if self.rounding == "signround":
            return OffsetRounding(weight, scale, self.weight, bounds=CHANGE)
        return AdaptiveRounding(weight, scale, self.weight)

    def unit_loss(self, student: Tensor, teacher: Tensor, sample: int) -> dict[str, Tensor]:
        """J_B (eq. 3 over the power of the target), estimated from one sample."""
        wrong, _ = error_and_power(student, teacher, self.token_weights(sample))
        return {"block_error": wrong / self._power}

    def regularizer(self, unit: OpenUnit, progress: float) -> dict[str, Tensor]:
        """Of adaround; divided by a token's power as J_B is, so that its share is BRECQ's."""
        if self.rounding != "adaround":
            return {}
        penalty = rounding_penalty((q.rounding for q in unit.layers.values()), progress)
        weight = self.rounding_weight / self._token_power
        return {} if penalty is None else {"round": weight * penalty}

    def parameter_groups(self, unit: OpenUnit) -> list[dict[str, Any]]:
        """Offsets by the sign of their gradient, or logits by Adam; ranges and steps by Adam."""
        if self.stage.name != "rounding":
            return []
        if self.rounding == "signround":
            rule: dict[str, Any] = {"lr": self.lr or 1 / self.steps, "schedule": _linear, **SIGN}
        else:
            rule = {"lr": self.lr or 1e-3, "schedule": lambda progress: 1.0}
        ranges = {"lr": self.range_lr, "schedule": _cosine}
        rules = {"rounding": rule, "scale": ranges, "range": ranges}
        return [
            {"name": kind, "params": parameters, **rules[kind]}
            for kind, parameters in self._parts(unit).items()
            if parameters
        ]

    def on_loss(self, loss: Tensor) -> None:
        """Remembers the parameters of the smallest loss of a batch. Source: AutoRound."""
        if self.rounding == "signround" and self.stage_state and self.opened:
            keep_best.remember(self.stage_state, self._learned(self.opened), loss)

    def accept(self, unit: OpenUnit, state: StageState) -> None:
        """Keeps what was learned, hardened, only if the block objective is not worse for it."""
        before, learned = unit.results["block_error_joint"], self._learned(unit)
        versions = {"last": [parameter.detach().clone() for parameter in learned]}
        if self.rounding == "signround":
            versions["best"] = keep_best.remembered(state, len(learned))
        after = keep_best.take_best(
            learned,
            versions,
            lambda: keep_best.hard_error(self.frontier, unit, self._stream, self.token_weights),
        )
        if after > before:
            self._rest(unit)
        self._note(unit, before, after, "learned rounding")

    def _objective(self, unit: OpenUnit) -> float:
        """J_B behind the search, or where there was no range to search."""
        if "block_error_joint" not in unit.results:
            error = unit_error(self.frontier, unit.student_blocks, self._stream, self.token_weights)
            unit.results["block_error_joint"] = error
        return unit.results["block_error_joint"]

    @staticmethod
    def _note(unit: OpenUnit, before: float, after: float, what: str) -> None:
        if after > before:
            rank_zero_info(
                f"Unit {unit.unit.name}: {what} left the block error at {after:.3e}, above the "
                f"{before:.3e} of the search; the search is kept."
            )
        unit.results |= {
            "block_error_learned": after,
            "block_error_final": min(after, before),
            "rounding_accepted": float(after <= before),
        }

    @staticmethod
    def _parts(unit: OpenUnit) -> dict[str, list[Tensor]]:
        """What learns, by kind; what linears share stands there once."""
        found: dict[str, dict[Tensor, None]] = {"rounding": {}, "scale": {}, "range": {}}
        for layer in unit.layers.values():
            for name, parameter in layer.named_parameters():
                owner, _, leaf = name.partition(".")
                kind = "range" if owner != "rounding" else "scale"
                found["rounding" if leaf in ("offset", "logits") else kind][parameter] = None
        return {kind: list(parameters) for kind, parameters in found.items()}

    def _learned(self, unit: OpenUnit) -> list[Tensor]:
        return [p for parameters in self._parts(unit).values() for p in parameters]

    def _check_numbers(self) -> None:
        limits: tuple[tuple[str, float, float, float | None], ...] = (
            ("audited", self.audited, 0, None),
            ("largest", self.largest, 1, LARGEST),
            ("sweeps", self.sweeps, 1, None),
            ("range_tokens", self.range_tokens, 1, None),
            ("steps", self.steps, 1, None),
            ("price", self.price, 0, None),
            ("image_weight", 1 if self.image_weight == "mbq" else self.image_weight, 0, None),
        )
        for name, value, least, most in limits:
            if value < least or (most is not None and value > most):
                rule = f"at least {least}" if most is None else f"in [{least}, {most}]"
                raise ConfigError(f"model.{name} must be {rule}, got {value}.")
        quantile = self.threshold_quantile
        if quantile is not None and not 0 <= quantile <= 1:
            raise ConfigError(f"model.threshold_quantile must lie in [0, 1], got {quantile}.")
        for name, values, least in (
            ("shrinks", self.shrinks, 0.0),
            ("percentiles", self.percentiles, 0.5),
        ):
            if not values or not all(least < value <= 1 for value in values):
                raise ConfigError(
                    f"model.{name} must be shares in ({least}, 1], at least one, got {values}."
                )


def _linear(progress: float) -> float:
    return 1 - progress


def _cosine(progress: float) -> float:
    return (1 + math.cos(math.pi * progress)) / 2
