"""Channel salience: what a channel's scale is balanced by, and how timesteps are put together.

Source: PTQ4DiT (arXiv 2405.16005), sections 4.1 and 4.2. Everything is computed in float64, on the
device of the activations' table.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

from recon.errors import ConfigError
from recon.quantizers.transforms import smoothing_scale

Aggregation = Literal["ssc", "mean", "max", "midpoint"]
"""How the salience of activations is put together over timesteps: weighted by how little it agrees
with the weights' (the paper's SSC), evenly, by the largest, or that of the middle timestep alone
(the paper's "+CSB" row)."""


def weight_salience(weights: list[Tensor]) -> Tensor:
    """Largest magnitude of each input channel over all rows of all weights, [channels].

    Args:
        weights: [out, channels] each, of the linears that share the input.

    Source: PTQ4DiT, eq. 4.
    """
    return torch.stack([w.double().abs().amax(dim=0) for w in weights]).amax(dim=0)


def ranks(values: Tensor) -> Tensor:
    """Average ranks along the last axis, from 1: equal values share the mean of their places."""
    ordered = values.sort(dim=-1).values
    below = torch.searchsorted(ordered, values.contiguous(), right=False)
    up_to = torch.searchsorted(ordered, values.contiguous(), right=True)
    return (below + 1 + up_to).double() / 2


def spearman(one: Tensor, other: Tensor) -> Tensor:
    """Rank correlation in [-1, 1] along the last axis; 0 where one of the two is constant.

    Args:
        one: [..., channels].
        other: Broadcasts against it.
    """
    first, second = (ranks(v) - (v.shape[-1] + 1) / 2 for v in torch.broadcast_tensors(one, other))
    size = first.square().sum(-1).sqrt() * second.square().sum(-1).sqrt()
    return torch.where(size > 0, (first * second).sum(-1) / size.clamp_min(1e-300), size)


def timestep_weights(table: Tensor, weight: Tensor) -> Tensor:
    """SSC's weight η of each row, [rows], which sum to 1: softmax(-ρ), temperature 1.

    Args:
        table: Salience of the activations, one row per timestep, [rows, channels].
        weight: Salience of the weights, [channels].

    Source: PTQ4DiT, eqs 10 and 11.
    """
    return torch.softmax(-spearman(table.double(), weight.double()), dim=0)


def aggregate(table: Tensor, weight: Tensor, how: Aggregation) -> Tensor:
    """Salience of the activations over all timesteps, [channels].

    Args:
        table: One row per timestep in their order, [rows, channels].
        weight: Salience of the weights, [channels].
        how: See `Aggregation`.

    Raises:
        ConfigError: how has another value, or the table has no rows.

    Source: PTQ4DiT, eq. 14 (ssc).
    """
    if how not in get_args(Aggregation):
        raise ConfigError(
            f"salience is {how!r}, which is none of {', '.join(get_args(Aggregation))}. Choose ssc "
            "for the paper's."
        )
    if len(table) == 0:
        raise ConfigError(
            "The table of activation saliences has no rows. Record at least one timestep."
        )
    wide = table.double()
    if how == "mean":
        return wide.mean(dim=0)
    if how == "max":
        return wide.amax(dim=0)
    if how == "midpoint":
        return wide[len(wide) // 2]
    return timestep_weights(table, weight) @ wide


def balance_scale(activation: Tensor, weight: Tensor, *, gauge: bool = True) -> Tensor:
    """Factor b = sqrt(s(W) / s(X)) of the input, [channels]; weight columns are divided by it.

    Afterwards both have the salience sqrt(s(X) s(W)).

    Args:
        activation: s(X), [channels].
        weight: s(W), [channels].
        gauge: Divides b by its geometric mean. A common factor changes no code of any quantiser
            whose range follows the data, and b near 1 costs half precision less.

    Source: PTQ4DiT, eqs 5 to 7. Deviates: both saliences are at least 1e-5 (the authors' code adds
    1e-8 to s(W) only, and a dead input channel gives an infinite scale); the gauge.
    """
    scale = smoothing_scale(activation.double(), weight.double(), 0.5)
    return scale / scale.log().mean().exp() if gauge else scale
