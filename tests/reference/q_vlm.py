"""Equations 4 to 7 of Q-VLM (arXiv 2410.08119) and section 2.3's optimum, in Python floats."""

import math
from collections.abc import Sequence
from itertools import product


def soft_share(value: float, low: float, step: float, levels: int, literal: bool) -> list[float]:
    """Equation 5 for one value: how much of it belongs to each rounding point."""
    powers = []
    for m in range(levels):
        point = low + m * step
        distance = (value - point) ** 2
        powers.append(math.exp(-distance / step if literal else -distance / step**2))
    return [power / sum(powers) for power in powers]


def joint_table(
    first: Sequence[float], second: Sequence[float],
    ranges: tuple[tuple[float, float], tuple[float, float]], levels: int, literal: bool = False,
) -> list[list[float]]:  # fmt: skip
    """P[m][m'], averaged over paired values of two layers; `ranges` are (low, step) of each."""
    table = [[0.0] * levels for _ in range(levels)]
    for x, y in zip(first, second, strict=True):
        one = soft_share(x, *ranges[0], levels, literal)
        other = soft_share(y, *ranges[1], levels, literal)
        for m, mm in product(range(levels), repeat=2):
            table[m][mm] += one[m] * other[mm] / len(first)
    return table


def dependency(table: Sequence[Sequence[float]]) -> float:
    """Equation 4: conditional entropy of the second layer's point given the first one's."""
    found = 0.0
    for row in table:
        marginal = sum(row)
        found -= sum(p * math.log(p / marginal) for p in row if p > 0)
    return found


def every_partition(layers: int, largest: int) -> list[list[range]]:
    """All ways to cut a chain into blocks of at most `largest`."""
    if layers == 0:
        return [[]]
    return [
        [*front, range(layers - size, layers)]
        for size in range(1, min(largest, layers) + 1)
        for front in every_partition(layers - size, largest)
    ]


def gain(
    blocks: Sequence[range], pairs: Sequence[float], threshold: float, candidates: int, price: float
) -> float:
    """What the optimum maximises."""
    total = 0.0
    for block in blocks:
        total += sum(pairs[k] - threshold for k in block[:-1])
        total -= price * (candidates ** len(block) - candidates * len(block))
    return total


def greedy(pairs: Sequence[float], threshold: float, largest: int) -> list[list[int]]:
    """Equation 7, layer by layer."""
    blocks: list[list[int]] = [[0]]
    for layer in range(1, len(pairs) + 1):
        block = blocks[-1]
        terms = pairs[block[0] : layer]
        if len(block) < largest and sum(terms) > len(terms) * threshold:
            block.append(layer)
        else:
            blocks.append([layer])
    return blocks


def rounding_points(values: Sequence[float], levels: int, power: float) -> tuple[float, float]:
    """Lowest point and step of the range, shrunk by 0 to 60 %, on which rounding costs least."""
    best = (math.inf, 0.0, 1.0)
    for number in range(7):
        share = 1 - 0.1 * number
        low = share * min(values)
        step = share * (max(values) - min(values)) / (levels - 1)
        cost = 0.0
        for value in values:
            code = min(max(round((value - low) / step), 0), levels - 1)
            cost += abs(low + code * step - value) ** power
        best = min(best, (cost, low, step), key=lambda found: found[0])
    return best[1], best[2]
