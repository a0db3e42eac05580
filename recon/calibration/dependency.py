"""How much a layer's output leaves open about the next one's: entropy of a joint soft histogram.

Source: Q-VLM (arXiv 2410.08119), equations 4 to 6. Hidden states are assigned softly to the M
rounding points of a quantiser; the table of one layer's points against the next one's gives the
conditional entropy. Everything is computed in float64 and may be added up over samples, batches and
processes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from recon.calibration import ranks
from recon.errors import ConfigError

SHRINKS = tuple(1 - 0.1 * number for number in range(7))
"""Shares of the full range tried for the rounding points. Source: quant_modules.py of Q-VLM."""


def rounding_points(parts: Sequence[Tensor], levels: int, power: float) -> tuple[float, float]:
    """The lowest rounding point and the step: the range on which rounding costs the least.

    The cost is Σ |x - Q(x)|^power; both ends of the range shrink alike. All processes take part
    and get the same. Constant values get the step 1.

    Args:
        parts: This process's values, any shapes; may be empty.
        levels: Number of points, at least 2.
        power: Positive; below 1 outliers count little.

    Source: Q-VLM, implementation details: l_p distance, exponent 0.5 in the code.
    """
    device = parts[0].device if parts else None
    ends = torch.full((2,), -torch.inf, dtype=torch.float64, device=device)
    for values in parts:
        low, high = values.double().aminmax()
        ends = torch.maximum(ends, torch.stack([-low, high]))
    minus_low, high = ranks.maximum(ends)
    errors = torch.zeros(len(SHRINKS), dtype=torch.float64, device=device)
    steps = [(high + minus_low) * share / (levels - 1) for share in SHRINKS]
    steps = [torch.where(step > 0, step, 1.0) for step in steps]
    for values in parts:
        for number, (share, step) in enumerate(zip(SHRINKS, steps, strict=True)):
            place = values.double() / step + minus_low * share / step
            rounded = place.round().clamp_(0, levels - 1)
            errors[number] += (rounded - place).mul_(step).abs_().pow_(power).sum()
    best = int(ranks.total(errors).argmin())
    return -float(minus_low) * SHRINKS[best], float(steps[best])


def soft_assignment(
    values: Tensor, low: float, step: float, levels: int, *, literal: bool = False
) -> Tensor:
    """Share of each value that belongs to each rounding point, [..., levels], float64; sums to 1.

    softmax over m of -(u - m)² with u = (value - low) / step, for m = 0 to levels - 1.

    Args:
        values: Any shape.
        low: The lowest rounding point.
        step: Distance of two points, positive, in the units of `values`.
        levels: Number of points M, at least 2.
        literal: The exponent as printed, -(value - point)² / step, whose temperature has the
            inverse units of the values: small steps make the assignment uniform, large ones hard.

    Raises:
        ConfigError: step is not positive or there are fewer than two points.

    Source: Q-VLM, eq. 5. Deviates: dimensionless unless literal.
    """
    if not step > 0 or levels < 2:
        raise ConfigError(
            f"soft_assignment needs a positive step and at least 2 levels, got {step} and "
            f"{levels}. Give a constant tensor the step 1."
        )
    points = torch.arange(levels, dtype=torch.float64, device=values.device)
    distance = (values.double().unsqueeze(-1) - low) / step - points
    return torch.softmax(distance.square().mul(-step if literal else -1.0), dim=-1)


def joint_histogram(first: Tensor, second: Tensor) -> Tensor:
    """Sum over values of the outer products of their assignments, [levels, levels], float64.

    Not divided by the number of values, which is the sum of the table: tables of parts add up.

    Args:
        first: Assignments of one layer's output, [..., levels].
        second: Those of the next layer's output at the same places, [..., levels].
    """
    return first.flatten(0, -2).T @ second.flatten(0, -2)


def conditional_entropy(table: Tensor) -> Tensor:
    """H(second | first) of joint histograms [..., levels, levels], in nats: [...] in [0, log M].

    A row that nothing was assigned to counts nothing; an empty table gives 0. Differentiable, as
    the assignments are.

    Source: Q-VLM, eq. 4.
    """
    total = table.sum((-2, -1), keepdim=True)
    joint = table / torch.where(total > 0, total, 1.0)
    marginal = joint.sum(-1, keepdim=True)  # over the second layer's points
    return (joint * _log(marginal) - joint * _log(joint)).sum((-2, -1))


def _log(share: Tensor) -> Tensor:
    """Logarithm of what is there, 0 of what is not: empty cells have no gradient either."""
    tiny = torch.finfo(share.dtype).tiny  # 1 / x is finite from here on
    return torch.where(share >= tiny, share, 1.0).log()


def span(dependency: Sequence[float], first: int, last: int) -> float:
    """D(first, last): the dependencies of the last - first neighbouring pairs in between, summed.

    Source: Q-VLM, eq. 6. Deviates: as many terms as pairs; the equation has one more.
    """
    return sum(dependency[first:last])
