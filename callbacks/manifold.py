"""How much of one set of points another one covers: precision and recall of generated pictures."""

import torch
from torch import Tensor

from recon.errors import ConfigError

NEIGHBOURS = 3
"""Source: Kynkäänniemi et al. (arXiv 1904.06991), section 2."""
_ROWS = 1024
"""Points whose distances to all others are in memory at a time."""


def precision_and_recall(
    generated: Tensor, reference: Tensor, neighbours: int = NEIGHBOURS
) -> tuple[float, float]:
    """Share of generated points among the reference, and of reference points among the generated.

    A set's manifold is estimated by balls around its points, each as wide as the distance to the
    point's k-th nearest neighbour in the set.

    Args:
        generated: Features [points, features].
        reference: As many features; the paper has as many points too, and so should you: the
            fewer points, the wider the balls.
        neighbours: k.

    Returns:
        Precision and recall, each in [0, 1].

    Raises:
        ConfigError: A set has no more than `neighbours` points.

    Source: Kynkäänniemi et al. (arXiv 1904.06991), eq. 1 and 2.
    """
    if min(len(generated), len(reference)) <= neighbours:
        raise ConfigError(
            f"Precision and recall with {neighbours} neighbours were asked of {len(generated)} "
            f"generated and {len(reference)} reference pictures; each set needs more pictures "
            "than neighbours. Use more pictures or fewer neighbours."
        )
    return _covered(generated, reference, neighbours), _covered(reference, generated, neighbours)


def _covered(points: Tensor, centres: Tensor, neighbours: int) -> float:
    """Share of the points that lie in the ball of at least one centre."""
    # The nearest neighbour is the centre itself, at distance 0.
    radii = torch.cat(
        [
            _distances(rows, centres).kthvalue(neighbours + 1, dim=1).values
            for rows in centres.split(_ROWS)
        ]
    )
    inside = sum(
        int((_distances(rows, centres) <= radii).any(dim=1).sum()) for rows in points.split(_ROWS)
    )
    return inside / len(points)


def _distances(rows: Tensor, centres: Tensor) -> Tensor:
    # By matrix products, a distance of 0 would come out as rounding.
    return torch.cdist(rows, centres, compute_mode="donot_use_mm_for_euclid_dist")
