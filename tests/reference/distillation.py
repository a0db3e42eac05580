"""Equations 9 to 11 of S²Q-VDiT (arXiv 2508.04016), one token at a time."""

import math

from torch import Tensor


def weighted_error_by_loop(student: Tensor, teacher: Tensor, weight: Tensor) -> float:
    """Equation 10, averaged over the batch, with the channels' mean instead of their sum.

    Source: S²Q-VDiT, eq. 10.
    """
    batch, tokens, channels = student.shape
    total = 0.0
    for sample in range(batch):
        for token in range(tokens):
            square = 0.0
            for channel in range(channels):
                difference = student[sample, token, channel] - teacher[sample, token, channel]
                square += float(difference) ** 2
            total += float(weight[sample, token]) * square / channels
    return total / tokens / batch


def weights_by_loop(salience: list[float], lambda_min: float, lambda_max: float) -> list[float]:
    """Equation 11 for the tokens of one sample.

    Source: S²Q-VDiT, eq. 11; 1 where maximum and minimum agree.
    """
    low, high = min(salience), max(salience)
    if low == high:
        return [1.0] * len(salience)
    return [(s - low) / (high - low) * (lambda_max - lambda_min) + lambda_min for s in salience]


def column_sums_by_loop(query: Tensor, key: Tensor) -> list[float]:
    """S_j, the softmax attention that token j receives from all queries of all heads.

    Source: S²Q-VDiT, the sum over h and i below eq. 9.

    Args:
        query: [heads, tokens, channels].
        key: [heads, tokens, channels].
    """
    heads, tokens, channels = query.shape
    sums = [0.0] * tokens
    for head in range(heads):
        for i in range(tokens):
            logits = [float(query[head, i] @ k) / math.sqrt(channels) for k in key[head]]
            top = max(logits)
            exponentials = [math.exp(value - top) for value in logits]
            for j in range(tokens):
                sums[j] += exponentials[j] / sum(exponentials)
    return sums
