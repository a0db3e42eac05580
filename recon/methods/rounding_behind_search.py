"""What Q-VLM does to weights behind the joint search: ours; the paper rounds to nearest.

    signround, adaround   `LearnedRounding`, with ranges and step sizes, on the block objective
    gptq                  `accepted_gptq`

Either is kept only if the block objective of the hard codes is not above that of the search.
"""

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from recon.engine import keep_best, schedules, walk
from recon.engine.prefixes import target_power, unit_error
from recon.engine.searched_layers import rest, round_weights
from recon.engine.staged import OpenStage
from recon.engine.unit import OpenUnit, Stage, StageState
from recon.layers.rounding import AdaptiveRounding, OffsetRounding, Rounding
from recon.quantizers.affine import dequantize
from recon.quantizers.gptq import gptq_codes

if TYPE_CHECKING:
    from recon.methods.q_vlm import QVLM

STAGE = "rounding"

SIGN = {"betas": (0.0, 0.0), "eps": 1e-20}
"""Adam without memory is g / |g|: SignSGD. The square of 1e-20 is zero, and 0 / eps no step."""


def stages(method: "QVLM") -> list[Stage]:
    """The configured steps, if anything learns."""
    learns = method.rounding in ("signround", "adaround")
    return [Stage(STAGE, method.steps)] if learns else []


def let_learn(method: "QVLM", unit: OpenUnit, candidates: Mapping[str, int]) -> None:
    """Gives the layers of a unit rounding and ranges that learn, from the given candidates on."""

    def rounding(weight: Tensor, scale: Tensor) -> Rounding:
        if method.rounding == "signround":
            return OffsetRounding(
                weight, scale, method.weight, bounds=method.learned_change, learn_offset=True
            )
        return AdaptiveRounding(weight, scale, method.weight)

    round_weights(unit, rounding)
    method.sites.place(unit, candidates, method.learned_change)


class LearnedRounding(OpenStage):
    """The open unit while the rounding of its weights is learned, with ranges and step sizes.

    Args:
        method: Whose unit it is.
    """

    def __init__(self, method: "QVLM") -> None:
        assert method.opened is not None
        self._method, self._unit = method, method.opened
        self._weigh = partial(method.token_weights, unit=self._unit.unit)
        self._searched = _searched_error(method, self._unit)
        let_learn(method, self._unit, method.candidates)
        power, tokens = target_power(method.frontier, self._weigh)
        self.power = power / method.sample_count
        """Weighted square of a sample's target, on average."""
        self.token_power = power / tokens
        """That of a token."""

    @property
    def _remembers(self) -> bool:
        """Source: AutoRound, which keeps the parameters of the smallest loss of a batch."""
        return self._method.rounding == "signround"

    @property
    def _parts(self) -> dict[str, list[Tensor]]:
        """What learns, by kind; what linears share stands there once."""
        found: dict[str, dict[Tensor, None]] = {"rounding": {}, "scale": {}, "range": {}}
        for layer in self._unit.layers.values():
            for name, parameter in layer.named_parameters():
                owner, _, leaf = name.partition(".")
                kind = "range" if owner != "rounding" else "scale"
                found["rounding" if leaf in ("offset", "logits") else kind][parameter] = None
        return {kind: list(parameters) for kind, parameters in found.items()}

    @property
    def learned(self) -> list[Tensor]:
        """All that learns."""
        return [p for parameters in self._parts.values() for p in parameters]

    def state(self) -> dict[str, Tensor]:
        """The best parameters so far."""
        return keep_best.best_so_far(self.learned) if self._remembers else {}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Offsets by the sign of their gradient, or logits by Adam; ranges and steps by Adam."""
        method = self._method
        if method.rounding == "signround":
            rule = {"lr": method.lr or 1 / method.steps, "schedule": schedules.linear, **SIGN}
        else:
            rule = {"lr": method.lr or 1e-3, "schedule": schedules.constant}
        ranges = {"lr": method.range_lr, "schedule": schedules.cosine}
        rules = {"rounding": rule, "scale": ranges, "range": ranges}
        return [
            {"name": kind, "params": parameters, **rules[kind]}
            for kind, parameters in self._parts.items()
            if parameters
        ]

    def on_loss(self, loss: Tensor, state: StageState) -> None:
        """Remembers the parameters of the smallest loss."""
        if self._remembers:
            keep_best.remember(state, self.learned, loss)

    def conclude(self, state: StageState) -> dict[str, Any]:
        """Keeps what was learned, hardened, only if the block objective is not worse for it."""
        method, unit, learned = self._method, self._unit, self.learned
        versions = {"last": [parameter.detach().clone() for parameter in learned]}
        if self._remembers:
            versions["best"] = keep_best.remembered(state, len(learned))
        hard_error = partial(
            keep_best.hard_error, method.frontier, unit, method.stream, self._weigh
        )
        after = keep_best.take_best(learned, versions, hard_error)
        if after > self._searched:
            rest(unit, method.weight, method.sites, method.candidates)
        keep_best.note(unit, self._searched, after, "learned rounding")
        return {}


@torch.no_grad()
def accepted_gptq(method: "QVLM", unit: OpenUnit) -> dict[str, Tensor]:
    """GPTQ's codes of each layer on the step sizes it has; none where they are refused."""
    before = _searched_error(method, unit)
    record = unit.record if method.wants_gram else walk.record_student(method, unit)
    found = {}
    for group in unit.groups:
        for name in group.linears:
            layer = unit.layers[name]
            weight = layer.transformed_weight()
            assert layer.rounding is not None
            scale = layer.rounding.scale(weight)
            found[name] = gptq_codes(weight, record.gram[group.name], scale, method.weight)
            layer.resident_weight = dequantize(found[name], scale, method.weight)
    after = _block_error(method, unit)
    for layer in unit.layers.values():
        layer.resident_weight = None
    keep_best.note(unit, before, after, "GPTQ")
    return found if after <= before else {}


def _searched_error(method: "QVLM", unit: OpenUnit) -> float:
    """J_B behind the search, or where there was no range to search."""
    if "block_error_joint" not in unit.results:
        unit.results["block_error_joint"] = _block_error(method, unit)
    return unit.results["block_error_joint"]


def _block_error(method: "QVLM", unit: OpenUnit) -> float:
    weigh = partial(method.token_weights, unit=unit.unit)
    return unit_error(method.frontier, unit.student_blocks, method.stream, weigh)
