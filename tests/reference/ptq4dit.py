"""Equations 3 to 11 and 14 of PTQ4DiT (arXiv 2405.16005), channel by channel, in Python floats."""

import math
from collections.abc import Sequence


def activation_salience(tokens: Sequence[Sequence[float]]) -> list[float]:
    """Equation 4: the largest magnitude of each channel over all tokens."""
    return [max(abs(token[j]) for token in tokens) for j in range(len(tokens[0]))]


def weight_salience(weight: Sequence[Sequence[float]]) -> list[float]:
    """Equation 4 for a weight [out][in]."""
    return [max(abs(row[j]) for row in weight) for j in range(len(weight[0]))]


def average_ranks(values: Sequence[float]) -> list[float]:
    """Ranks from 1; equal values share their mean rank."""
    return [
        sum(other < value for other in values) + (sum(other == value for other in values) + 1) / 2
        for value in values
    ]


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float:
    """Spearman's ρ as Pearson's correlation of the ranks; 0 where one of the two is constant."""
    first, second = average_ranks(one), average_ranks(other)
    mean = (len(one) + 1) / 2
    covariance = sum((a - mean) * (b - mean) for a, b in zip(first, second, strict=True))
    spread = math.sqrt(sum((a - mean) ** 2 for a in first) * sum((b - mean) ** 2 for b in second))
    return covariance / spread if spread > 0 else 0.0


def softmax_of_minus(values: Sequence[float]) -> list[float]:
    """Equation 11."""
    powers = [math.exp(-value) for value in values]
    return [power / sum(powers) for power in powers]


def calibrated_salience(table: Sequence[Sequence[float]], weight: Sequence[float]) -> list[float]:
    """Equations 10 and 14: s_ρ of the activations, from one row of maxima per timestep."""
    eta = softmax_of_minus([rank_correlation(row, weight) for row in table])
    return [
        sum(share * row[j] for share, row in zip(eta, table, strict=True))
        for j in range(len(weight))
    ]


def balancing(activation: Sequence[float], weight: Sequence[float]) -> list[float]:
    """Equations 5 and 6: the diagonal of B_X; that of B_W is its reciprocal (eq. 7)."""
    balanced = [math.sqrt(x * w) for x, w in zip(activation, weight, strict=True)]
    return [middle / x for middle, x in zip(balanced, activation, strict=True)]
