"""The candidates among which the range of one activation site is searched."""

from collections.abc import Sequence

import torch
from torch import Tensor

from recon.layers.static_range import StaticRange
from recon.layers.token_range import TokenRange
from recon.quantizers.spec import QuantSpec

Ends = tuple[float] | tuple[Tensor, Tensor]
"""Arguments of a range: the ratio of a `TokenRange`, or low and high of a `StaticRange`."""


class SearchedRange:
    """A range shared by the linears of one input, which moves from candidate to candidate.

    Args:
        spec: Strategy token takes ratios as candidates, the others pairs of ends.
        candidates: At least one; the range starts at the first.
    """

    def __init__(self, spec: QuantSpec, candidates: Sequence[Ends]) -> None:
        self.spec, self._candidates = spec, list(candidates)
        self.range = self._made(0, None)

    def __len__(self) -> int:
        return len(self._candidates)

    def select(self, candidate: int) -> None:
        """Moves the range to a candidate."""
        self.range.move(*self._candidates[candidate])

    def restart(
        self, candidate: int, bounds: tuple[float, float] | None
    ) -> TokenRange | StaticRange:
        """Replaces the range by a fresh one.

        Args:
            candidate: Where it starts.
            bounds: Of the logarithm of its change, if it is learned; None: it is not.
        """
        self.range = self._made(candidate, bounds)
        return self.range

    def _made(self, candidate: int, bounds: tuple[float, float] | None) -> TokenRange | StaticRange:
        ends = self._candidates[candidate]
        if len(ends) == 1:
            return TokenRange(ends[0], self.spec, bounds=bounds)
        return StaticRange(*ends, self.spec, None if bounds is None else "log", bounds=bounds)

    @torch.no_grad()
    def errors(self, tokens: Tensor, power: float) -> Tensor:
        """Σ |x - Q(x)|^power of every candidate, float64 [candidates]; parts add up.

        Args:
            tokens: [..., channels].
            power: Positive.

        Source: the l_p distance of Q-VLM, from LAPQ (arXiv 1911.07190).
        """
        found = []
        for candidate in range(len(self)):
            self.select(candidate)
            found.append((self.range(tokens) - tokens).abs().double().pow_(power).sum())
        return torch.stack(found)
