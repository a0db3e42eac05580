"""The activation ranges of units that are searched: made, moved, replaced by learned ones."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from recon.calibration import ranks
from recon.calibration.quantiles import two_sided_quantiles
from recon.calibration.statistics import UnitRecord
from recon.engine.unit import LayerGroup, OpenUnit, Unit
from recon.layers.searched_range import Ends, SearchedRange
from recon.layers.token_range import TokenRange
from recon.quantizers.spec import QuantSpec

if TYPE_CHECKING:
    from recon.engine.reconstruction import Reconstruction


class ActivationSites:
    """The searched range of every input group, by the name of its first linear.

    Args:
        shares: Candidates, widest first: shares of the range in (0, 1], or two-sided percentiles.
        percentiles: Whether they are percentiles; only of fixed ranges.
        power: Of the distance |x - Q(x)| that the initial range minimises.
    """

    def __init__(self, shares: Sequence[float], *, percentiles: bool, power: float) -> None:
        self._shares, self._percentiles, self._power = shares, percentiles, power
        self._sites: dict[str, SearchedRange] = {}
        self._initial: dict[str, int] = {}

    def add(self, group: LayerGroup, record: UnitRecord, spec: QuantSpec) -> SearchedRange:
        """The range of a group's input, at its initial candidate; all processes take part."""
        tokens = record.tokens.get(group.name, [])
        site = SearchedRange(spec, self._ends(group.name, record, spec))
        device = record.absmax[group.name].device
        errors = torch.zeros(len(site), dtype=torch.float64, device=device)
        for part in tokens:
            errors += site.errors(part, self._power)
        self._initial[group.name] = int(ranks.total(errors).argmin())
        site.select(self._initial[group.name])
        self._sites[group.name] = site
        return site

    def _ends(self, name: str, record: UnitRecord, spec: QuantSpec) -> list[Ends]:
        if spec.strategy == "token":
            return [(share,) for share in self._shares]
        low, high = record.lowest[name], record.highest[name]
        parts = record.tokens.get(name, [])
        if spec.strategy == "tensor":
            low, high = low.min().view(1), high.max().view(1)
            parts = [part.reshape(-1, 1) for part in parts]
        if self._percentiles:
            ends = two_sided_quantiles(parts, low, high, self._shares)
        else:
            ends = [(share * low, share * high) for share in self._shares]
        shape = () if spec.strategy == "tensor" else low.shape
        return [(low.view(shape), high.view(shape)) for low, high in ends]

    def initial(self, names: Sequence[str]) -> tuple[int, ...]:
        """Where these sites stood when they were added."""
        return tuple(self._initial[name] for name in names)

    def select(self, names: Sequence[str], candidates: Sequence[int]) -> None:
        """Moves sites to candidates."""
        for name, candidate in zip(names, candidates, strict=True):
            self._sites[name].select(candidate)

    def place(
        self, unit: OpenUnit, chosen: Mapping[str, int], bounds: tuple[float, float] | None
    ) -> None:
        """Gives each input of a unit a fresh range at its chosen candidate.

        Args:
            unit: Its layers take the ranges.
            chosen: Candidate of each site; groups without one have no range.
            bounds: Within which they learn; None: they do not.
        """
        for group in unit.groups:
            if group.name not in chosen:
                continue
            made = self._sites[group.name].restart(chosen[group.name], bounds)
            for name in group.linears:
                layer = unit.layers[name]
                made.to(_device(layer.teacher_weight))
                if isinstance(made, TokenRange):
                    layer.activation_range = made
                else:
                    assert layer.transform is not None
                    layer.transform.static = made


def site_names(module: "Reconstruction", unit: Unit) -> list[list[str]]:
    """The inputs of each block of a unit that the method quantises."""
    return [
        [
            f"{block}.{group.linears[0]}"
            for group in module.adapter.input_groups(block)
            if group.role not in module.skip_roles and module.activation_spec(group.role)
        ]
        for block in unit.blocks
    ]


def _device(weight: Tensor | None) -> torch.device:
    assert weight is not None
    return weight.device
