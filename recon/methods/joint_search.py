"""The joint search of a block's clip ranges in Q-VLM (arXiv 2410.08119, eqs 2 and 3).

    layer-wise   eq. 2   the warm start: each layer's candidate by its own output
    joint        eq. 3   all candidates by the output of the block; never worse than the warm start

The warm start is ours. In which order candidates are tried stands in `recon.calibration.search`.
"""

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from recon.calibration.search import CoordinateSearch, ProductSearch, SearchPlan
from recon.engine.activation_sites import site_names
from recon.engine.prefixes import searched_prefixes
from recon.engine.searched_layers import rest
from recon.engine.staged import OpenStage
from recon.engine.unit import Stage, StageState, Unit

if TYPE_CHECKING:
    from recon.methods.q_vlm import QVLM

STAGE = "search"


def stages(method: "QVLM", unit: Unit) -> list[Stage]:
    """One step per setting that is tried, if the unit has any range."""
    return [Stage(STAGE, _plan(method, unit).steps)] if any(site_names(method, unit)) else []


def _plan(method: "QVLM", unit: Unit) -> SearchPlan:
    sites = [len(names) for names in site_names(method, unit)]
    if method.search == "product":
        return ProductSearch(sites, len(method.shares))
    return CoordinateSearch(sites, len(method.shares), method.sweeps)


class JointSearch(OpenStage):
    """The open unit while its ranges are searched; leaves them on the joint optimum.

    Args:
        method: Whose unit it is.
    """

    def __init__(self, method: "QVLM") -> None:
        assert method.opened is not None
        self._method, self._unit = method, method.opened
        self.plan = _plan(method, self._unit.unit)
        weigh = partial(method.token_weights, unit=self._unit.unit)
        self.prefixes = searched_prefixes(method, self._unit, method.sites, method.stream, weigh)

    def state(self) -> dict[str, Tensor]:
        """Errors of what was tried, step by step, and the forwards of one layer they took."""
        errors = torch.full((self.plan.steps,), torch.inf, dtype=torch.float64)
        return {"errors": errors, "forwards": torch.zeros((), dtype=torch.int64)}

    def step(self, step: int, state: StageState) -> dict[str, float]:
        """Error of one layer's output under the candidates of this step."""
        plan, prefixes = self.plan, self.prefixes
        known = state["errors"].cpu()
        if step and not prefixes.started:  # continued: what the step before left is made again
            prefixes.error(plan.settings(step - 1, known))
        before = prefixes.forwards
        error = prefixes.error(plan.settings(step, known))
        state["errors"][step] = error
        state["forwards"].add_(prefixes.forwards - before)
        return {"candidate_error": error}

    def conclude(self, state: StageState) -> dict[str, Any]:
        """Takes the joint optimum; candidate of each site of the units searched so far."""
        method, unit = self._method, self._unit
        outcome = self.plan.outcome(state["errors"].cpu())
        assert outcome.joint_error <= outcome.warm_error
        unit.results |= {
            "block_error_warm": outcome.warm_error,
            "block_error_joint": outcome.joint_error,
            "search_forwards": float(state["forwards"]),
        }
        chosen = dict(method.candidates)
        for names, setting in zip(site_names(method, unit.unit), outcome.joint, strict=True):
            chosen |= dict(zip(names, setting, strict=True))
        rest(unit, method.weight, method.sites, chosen)
        return {"candidates": chosen}
