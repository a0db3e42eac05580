"""Axes of a chart: where a value stands, and which values are written beside it."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from recon.report.numbers import tick

_STEPS = (1, 2, 5, 10)
_MANTISSAS = ((1, 2, 5), (1, 3), (1,))
"""Marks of a decade, from the most to the fewest."""


@dataclass(frozen=True)
class Axis:
    """Values from `low` to `high` along pixels from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    @classmethod
    def over(
        cls, values: Iterable[float], start: float, end: float, *, log: bool = False
    ) -> "Axis":
        """An axis that holds all values with a little room; a single value stands in the middle.

        Args:
            values: At least one; positive where `log`.
            start: Pixels of the lowest value.
            end: Pixels of the highest.
            log: Whether equal ratios take equal room.
        """
        found = list(values)
        low, high = min(found), max(found)
        if log:
            room = max((high / low) ** 0.06, 1.05)
            return cls(low / room, high * room, start, end, log=True)
        room = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
        return cls(low - room, high + room, start, end)

    def __call__(self, value: float) -> float:
        """Pixels of a value."""
        low, high = self._scaled(self.low), self._scaled(self.high)
        share = (self._scaled(value) - low) / (high - low)
        return round(self.start + share * (self.end - self.start), 2)

    def _scaled(self, value: float) -> float:
        return math.log10(value) if self.log else value

    def marks(self, most: int = 5) -> list[tuple[float, str]]:
        """Round values inside the axis, and how they are written."""
        values = self._decades(most) if self.log else self._even(most)
        return [(value, tick(value)) for value in values]

    def _even(self, most: int) -> list[float]:
        rough = (self.high - self.low) / most
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(power * factor for factor in _STEPS if power * factor >= rough * 0.999)
        first, last = math.ceil(self.low / step), math.floor(self.high / step)
        return [round(step * n, 12) for n in range(first, last + 1)]

    def _decades(self, most: int) -> list[float]:
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for mantissas in _MANTISSAS:
            values = [m * 10.0**p for p in powers for m in mantissas]
            inside = [value for value in values if self.low <= value <= self.high]
            if len(inside) <= most:
                return inside if len(inside) > 1 else self._even(most)
        stride = -(-len(inside) // most)
        return inside[::stride]


def whole_marks(count: int, most: int = 6) -> Sequence[int]:
    """Some of the places 0 … count-1, evenly spaced, the first among them."""
    for step in (1, 2, 5, 10, 20, 50, 100, 200, 500):
        if (count - 1) // step < most:
            return range(0, count, step)
    return range(0, count, -(-count // most))
