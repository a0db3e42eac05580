"""Joint searches over the candidates of a block's layers: in which order, and what was best.

A layer's setting is one candidate number per activation site. A plan turns a step's number and the
errors of the steps before it into settings, so that those errors are all the state of a search.

Source: Q-VLM (arXiv 2410.08119), section 3.2; the order of visits, the warm start and the
coordinate search are ours.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

Setting = tuple[int, ...]
"""Candidate of each site of a layer."""
Settings = tuple[Setting, ...]
"""Of a block's first layers, front to back."""


@dataclass(frozen=True)
class Outcome:
    """What a search found, with the block objective of both."""

    warm: Settings
    """Layer by layer, each candidate the best for its own layer's output."""
    warm_error: float
    joint: Settings
    """The best of all that were tried; the warm start unless something is strictly better."""
    joint_error: float


class SearchPlan(ABC):
    """The steps of a search.

    Args:
        sites: Number of activation sites of each of the block's layers.
        candidates: Values tried at each site.
    """

    def __init__(self, sites: Sequence[int], candidates: int) -> None:
        self.sites, self.candidates = tuple(sites), candidates

    @property
    @abstractmethod
    def steps(self) -> int:
        """How many settings are evaluated."""

    @abstractmethod
    def settings(self, step: int, errors: Tensor) -> Settings:
        """What a step evaluates: as many layers as there are settings, from the block's first on.

        Args:
            step: From 0.
            errors: Of the steps before, float64 [steps], on the CPU. The error is that of the
                output of the last layer that has a setting.
        """

    @abstractmethod
    def outcome(self, errors: Tensor) -> Outcome:
        """What all steps found."""

    def _alike(self, layer: int, candidate: int) -> Setting:
        return (candidate,) * self.sites[layer]


class ProductSearch(SearchPlan):
    """One candidate per layer, all combinations, depth first.

    Every node of the tree is one step and, with its parent's output at hand, one layer forward:
    c + c² + c³ of them for three layers. The warm start is the path through the tree that takes the
    best child at each level, so it costs nothing more.
    """

    def __init__(self, sites: Sequence[int], candidates: int) -> None:
        super().__init__(sites, candidates)
        self._nodes = self._below(())

    def _below(self, node: tuple[int, ...]) -> list[tuple[int, ...]]:
        if len(node) == len(self.sites):
            return []
        children = [(*node, candidate) for candidate in range(self.candidates)]
        return [found for child in children for found in (child, *self._below(child))]

    @property
    def steps(self) -> int:
        """See `SearchPlan.steps`."""
        return len(self._nodes)

    def settings(self, step: int, errors: Tensor) -> Settings:
        """See `SearchPlan.settings`."""
        return self._settings(self._nodes[step])

    def _settings(self, node: tuple[int, ...]) -> Settings:
        return tuple(self._alike(layer, candidate) for layer, candidate in enumerate(node))

    def outcome(self, errors: Tensor) -> Outcome:
        """See `SearchPlan.outcome`."""
        error = dict(zip(self._nodes, errors.tolist(), strict=True))
        warm: tuple[int, ...] = ()
        for _ in self.sites:
            warm = min(((*warm, c) for c in range(self.candidates)), key=error.__getitem__)
        leaves = [node for node in self._nodes if len(node) == len(self.sites)]
        best = min(leaves, key=error.__getitem__)
        joint = best if error[best] < error[warm] else warm
        return Outcome(self._settings(warm), error[warm], self._settings(joint), error[joint])


class CoordinateSearch(SearchPlan):
    """One site after the other, front to back, in several sweeps from the warm start.

    The warm start takes one candidate per layer. A site moves only where the block's error falls.

    Args:
        sites: Number of activation sites of each of the block's layers.
        candidates: Values tried at each site.
        sweeps: How often all sites are visited.
    """

    def __init__(self, sites: Sequence[int], candidates: int, sweeps: int) -> None:
        super().__init__(sites, candidates)
        self._visits = [
            (layer, site)
            for _ in range(sweeps)
            for layer, count in enumerate(sites)
            for site in range(count)
        ]

    @property
    def steps(self) -> int:
        """See `SearchPlan.steps`."""
        return self.candidates * (len(self.sites) + len(self._visits))

    def settings(self, step: int, errors: Tensor) -> Settings:
        """See `SearchPlan.settings`."""
        number, candidate = divmod(step, self.candidates)
        if number < len(self.sites):
            return (*self._warm(number, errors), self._alike(number, candidate))
        visit = number - len(self.sites)
        return self._changed(self._reached(visit, errors)[0], visit, candidate)

    def outcome(self, errors: Tensor) -> Outcome:
        """See `SearchPlan.outcome`."""
        warm, warm_error = self._reached(0, errors)
        return Outcome(warm, warm_error, *self._reached(len(self._visits), errors))

    def _errors(self, number: int, errors: Tensor) -> list[float]:
        first = number * self.candidates
        found: list[float] = errors[first : first + self.candidates].tolist()
        return found

    def _warm(self, layers: int, errors: Tensor) -> Settings:
        rows = [self._errors(layer, errors) for layer in range(layers)]
        return tuple(self._alike(layer, row.index(min(row))) for layer, row in enumerate(rows))

    def _reached(self, visits: int, errors: Tensor) -> tuple[Settings, float]:
        settings = self._warm(len(self.sites), errors)
        error = min(self._errors(len(self.sites) - 1, errors))
        for visit in range(visits):
            row = self._errors(len(self.sites) + visit, errors)
            if min(row) < error:
                error = min(row)
                settings = self._changed(settings, visit, row.index(error))
        return settings, error

    def _changed(self, settings: Settings, visit: int, candidate: int) -> Settings:
        layer, site = self._visits[visit]
        old = settings[layer]
        new = (*old[:site], candidate, *old[site + 1 :])
        return (*settings[:layer], new, *settings[layer + 1 :])
