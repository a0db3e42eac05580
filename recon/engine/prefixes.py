"""Block errors of a unit under chosen settings; outputs of its first layers are kept."""

from collections.abc import Callable, Sequence
from math import isfinite
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from recon.calibration import ranks
from recon.calibration.frontier import Frontier
from recon.calibration.search import Settings
from recon.engine.activation_sites import ActivationSites, site_names
from recon.engine.unit import OpenUnit
from recon.errors import NumericsError
from recon.losses.reconstruction import error_and_power

if TYPE_CHECKING:
    from recon.engine.reconstruction import Reconstruction

Weigh = Callable[[int], Tensor | None]
"""Weight of each token of a sample, [batch, tokens]; None counts all alike."""


class Prefixes:
    """Runs the layers of the open unit over a stream, under settings, and measures their outputs.

    Of each depth the outputs under the last setting are kept beside the streams: the next settings
    with the same first layers start from them. This changes how often layers run, and no result.

    Args:
        frontier: Whose open unit it is; its inner targets must have been recorded.
        blocks: The unit's quantised layers.
        stream: What enters them, `student` or `teacher`.
        select: Makes a layer use a setting, given its place in the unit.
        weigh: Weights of the error.
    """

    def __init__(
        self,
        frontier: Frontier,
        blocks: Sequence[nn.Module],
        stream: str,
        select: Callable[[int, tuple[int, ...]], None],
        weigh: Weigh,
    ) -> None:
        self._frontier, self._blocks, self._stream = frontier, blocks, stream
        self._select, self._weigh = select, weigh
        self._kept: dict[int, Settings] = {}
        self.forwards = 0
        """Forwards of one layer over all samples."""

    @property
    def started(self) -> bool:
        """Whether anything was run."""
        return self.forwards > 0

    def forget(self) -> None:
        """Drops what is kept, as if nothing had been run."""
        self._kept.clear()

    @torch.no_grad()
    def error(self, settings: Settings) -> float:
        """Relative squared error of the last given layer's output, over the samples of all ranks.

        Raises:
            NumericsError: An output is NaN or Inf.
        """
        depth = len(settings)
        for layer in range(1, depth):
            if self._kept.get(layer) != settings[:layer]:
                self._run(settings[:layer])
        return self._run(settings)

    def _run(self, settings: Settings) -> float:
        depth = len(settings)
        # Whatever stood on the former output of this depth is stale.
        self._kept = {layer: kept for layer, kept in self._kept.items() if layer < depth}
        self._select(depth - 1, settings[-1])
        block = self._blocks[depth - 1]
        sums = torch.zeros(2, dtype=torch.float64, device=self._frontier.device)
        for sample in self._frontier.calibration:
            before = self._stream if depth == 1 else f"prefix={depth - 1}"
            state = self._frontier.run([block], self._frontier.state(before, sample))
            if depth < len(self._blocks):
                self._frontier.keep(f"prefix={depth}", sample, state)
            target = self._frontier.target(sample, depth)
            tokens = self._frontier.tokens(state)
            sums += error_and_power(tokens, target, self._weigh(sample))
        if depth < len(self._blocks):
            self._kept[depth] = settings
        self.forwards += 1
        wrong, power = ranks.total(sums).tolist()
        if not isfinite(wrong / power):
            raise NumericsError(
                f"Block {depth} of the unit gives NaN or Inf under the candidates {settings}. The "
                "last checkpoint is good: look at the inputs of this block, or use wider ranges."
            )
        return wrong / power


def searched_prefixes(
    module: "Reconstruction", unit: OpenUnit, sites: ActivationSites, stream: str, weigh: Weigh
) -> Prefixes:
    """Prefixes of a unit whose settings are candidates of its activation sites.

    Its weights stay rounded as they are.
    """
    names = site_names(module, unit.unit)
    for layer in unit.layers.values():
        assert layer.teacher_weight is not None
        layer.keep_resident(layer.teacher_weight.dtype)
    return Prefixes(
        module.frontier,
        unit.student_blocks,
        stream,
        lambda layer, setting: sites.select(names[layer], setting),
        weigh,
    )


@torch.no_grad()
def unit_error(frontier: Frontier, blocks: Sequence[nn.Module], stream: str, weigh: Weigh) -> float:
    """Relative squared error of a unit's output as it stands, over the samples of all ranks."""
    sums = torch.zeros(2, dtype=torch.float64, device=frontier.device)
    for sample in frontier.calibration:
        state = frontier.run(blocks, frontier.state(stream, sample))
        sums += error_and_power(frontier.tokens(state), frontier.target(sample), weigh(sample))
    wrong, power = ranks.total(sums).tolist()
    return wrong / power


@torch.no_grad()
def target_power(frontier: Frontier, weigh: Weigh) -> tuple[float, float]:
    """Weighted square of all the open unit's targets, and how many tokens they are."""
    sums = torch.zeros(2, dtype=torch.float64, device=frontier.device)
    for sample in frontier.calibration:
        target = frontier.target(sample)
        sums[0] += error_and_power(target, target, weigh(sample))[1]
        sums[1] += target.shape[:2].numel()
    power, tokens = ranks.total(sums).tolist()
    return power, tokens
