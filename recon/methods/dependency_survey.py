"""The dependency of neighbouring layers in Q-VLM (arXiv 2410.08119, section 3.2).

    conditional entropy   eqs 4, 5   `step`, from a joint histogram of what leaves both layers
    of a block            eq. 6      the sum over its pairs, taken where blocks are cut (eq. 7)

One step per pair. Where another proxy or the audit asks for it, the pair is quantised on trial: the
entropy only stands for what a joint search brings, which the paper shows over samples at one layer.
"""

import math
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from recon.calibration.dependency import conditional_entropy
from recon.calibration.search import ProductSearch
from recon.calibration.selection import rank_correlation
from recon.engine import walk
from recon.engine.activation_sites import site_names
from recon.engine.pairs import pair_histogram
from recon.engine.prefixes import searched_prefixes
from recon.engine.staged import OpenStage
from recon.engine.unit import OpenUnit, Stage, StageState, Unit
from recon.models.capabilities import SeesPictures

if TYPE_CHECKING:
    from recon.methods.q_vlm import QVLM

STAGE = "dependency"


def stages(method: "QVLM") -> list[Stage]:
    """One step per pair of neighbours, unless nothing asks for their dependency."""
    pairs = len(method.adapter.block_names) - 1
    wanted = method.partition_by in ("entropy", "dp") or _audited(method)
    return [Stage(STAGE, pairs)] if wanted and pairs else []


class DependencySurvey(OpenStage):
    """The walk over all pairs of neighbours, in front of units that are not cut yet.

    Args:
        method: Whose streams stand in front of the first block.
    """

    def __init__(self, method: "QVLM") -> None:
        self._method = method
        self._names = method.adapter.block_names
        self._audited = _audited(method)

    def state(self) -> dict[str, Tensor]:
        """Histograms, and what trials found: infinity where there was none."""
        pairs, levels = len(self._names) - 1, self._method.levels
        unknown = torch.full((pairs,), torch.inf, dtype=torch.float64)
        tables = torch.zeros(pairs, 2, levels, levels, dtype=torch.float64)
        return {"histogram": tables, "quant_error": unknown, "ded": unknown.clone()}

    def step(self, step: int, state: StageState) -> dict[str, float]:
        """Joint histogram of a pair of neighbours, and what a trial of quantising them shows."""
        method = self._method
        walk.follow(method, step)
        pair = Unit(f"pair {step}", self._names[step : step + 2])
        if method.proxy == "quant_error" or step in self._audited:
            for name, value in self._trial(walk.trial_unit(method, pair), step).items():
                state[name][step] = value
        else:
            method.frontier.record(walk.blocks_of(method, pair), inner=True)
        table = pair_histogram(
            method, method.levels, method.initial_norm, literal=method.eq5_literal
        )
        state["histogram"][step] = table
        return {"dependency": float(conditional_entropy(table.sum(0)))}

    def _trial(self, pair: OpenUnit, number: int) -> dict[str, float]:
        """What quantising a pair of layers costs on full-precision inputs: proxies, true DED."""
        method = self._method
        sites = site_names(method, pair.unit)
        weigh = partial(method.token_weights, unit=pair.unit)
        prefixes = searched_prefixes(method, pair, method.sites, "teacher", weigh)
        found = {}
        if method.proxy == "quant_error":
            found["quant_error"] = prefixes.error(tuple(method.sites.initial(s) for s in sites))
        if number in self._audited:
            plan = ProductSearch([len(names) for names in sites], len(method.shares))
            errors = torch.full((plan.steps,), torch.inf, dtype=torch.float64)
            for step in range(plan.steps):
                errors[step] = prefixes.error(plan.settings(step, errors))
            outcome = plan.outcome(errors)
            found["ded"] = 1 - outcome.joint_error / outcome.warm_error
        return found

    def conclude(self, state: StageState) -> dict[str, Any]:
        """Every proxy of every pair, and how the chosen one ranks them beside the true DED."""
        tables = state["histogram"].cpu()
        found: dict[str, Any] = {"entropy": conditional_entropy(tables.sum(1)).tolist()}
        if isinstance(self._method.adapter, SeesPictures):
            for kind, name in enumerate(("entropy_image", "entropy_text")):
                found[name] = conditional_entropy(tables[:, kind]).tolist()
        for name in ("quant_error", "ded"):
            values = state[name].cpu()
            if not values.isinf().all():
                found[name] = [None if math.isinf(v) else v for v in values.tolist()]
        if self._audited:
            found["spearman"] = self._spearman(found[self._method.proxy], state["ded"].cpu())
        return {STAGE: found}

    def _spearman(self, proxy: list[float], ded: Tensor) -> float | None:
        pairs = torch.tensor(self._audited)
        found = rank_correlation(torch.tensor(proxy, dtype=torch.float64)[pairs], ded[pairs])
        constant = "none, one of them is the same for all"
        outcome = constant if found is None else f"{found:.2f}"
        if len(pairs) == 1:
            outcome = "none, one pair has no correlation"
        layers = "pair" if len(pairs) == 1 else "pairs"
        rank_zero_info(
            f"Spearman's correlation of {self._method.proxy} and the true dependency over "
            f"{len(pairs)} {layers} of layers: {outcome}."
        )
        return found


def _audited(method: "QVLM") -> list[int]:
    pairs = len(method.adapter.block_names) - 1
    if not method.has_choice:
        return []  # a search saves nothing there
    if method.proxy == "ded":
        return list(range(pairs))
    count = min(method.audited, pairs)
    return sorted(set(torch.linspace(0, pairs - 1, count).round().int().tolist()))
