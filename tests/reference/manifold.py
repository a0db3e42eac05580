"""Improved precision and recall, point by point.

Source: Kynkäänniemi et al., Improved Precision and Recall Metric for Assessing Generative Models
(arXiv 1904.06991), eq. 1 and 2.
"""

import math


def member(point: list[float], others: list[list[float]], k: int) -> bool:
    """Equation 1: whether the point lies within some other's distance to its k-th neighbour."""
    for centre in range(len(others)):
        distances = [
            math.dist(others[centre], others[i]) for i in range(len(others)) if i != centre
        ]
        if math.dist(point, others[centre]) <= sorted(distances)[k - 1]:
            return True
    return False


def precision_and_recall(
    generated: list[list[float]], reference: list[list[float]], k: int
) -> tuple[float, float]:
    """Equation 2, both ways."""
    precision = sum(member(point, reference, k) for point in generated) / len(generated)
    recall = sum(member(point, generated, k) for point in reference) / len(reference)
    return precision, recall
