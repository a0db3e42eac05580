"""Quantised attention as PTQ4DiT (arXiv 2405.16005) and its code describe it, in Python floats."""

import math
from collections.abc import Sequence

Matrix = Sequence[Sequence[float]]


def on_grid(value: float, step: float, zero_point: int, bits: int) -> float:
    """An unsigned code of `bits`, rounded half to even, and back."""
    code = min(max(round(value / step) + zero_point, 0), 2**bits - 1)
    return step * (code - zero_point)


def softmax(row: Sequence[float]) -> list[float]:
    """Of one query over all keys."""
    powers = [math.exp(value - max(row)) for value in row]
    return [power / sum(powers) for power in powers]


def quantized_attention(
    query: Matrix,
    key: Matrix,
    value: Matrix,
    grids: dict[str, tuple[float, int, int]],
) -> list[list[float]]:
    """One head: [queries][channels] from matrices [tokens][channels] and (step, zero, bits)."""

    def grid(name: str, matrix: Matrix) -> list[list[float]]:
        return [[on_grid(entry, *grids[name]) for entry in row] for row in matrix]

    factor = 1 / math.sqrt(len(query[0]))
    left = grid("query", [[factor * entry for entry in row] for row in query])
    right, values = grid("key", key), grid("value", value)
    logits = [[sum(a * b for a, b in zip(q, k, strict=True)) for k in right] for q in left]
    attention = grid("probability", [softmax(row) for row in logits])
    return [
        [sum(p * v[j] for p, v in zip(row, values, strict=True)) for j in range(len(values[0]))]
        for row in attention
    ]
