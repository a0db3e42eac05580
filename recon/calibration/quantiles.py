"""Quantiles of activations, channel by channel, from histograms that processes add up."""

from collections.abc import Sequence

import torch
from torch import Tensor

from recon.calibration import ranks

BINS = 2048
"""Bins between a channel's smallest and largest value; a quantile is known to one of them."""


def two_sided_quantiles(
    parts: Sequence[Tensor],
    lowest: Tensor,
    highest: Tensor,
    shares: Sequence[float],
    bins: int = BINS,
) -> list[tuple[Tensor, Tensor]]:
    """The (1 - p, p) quantiles of each channel for every p, float32 [channels] each.

    All processes take part and get the same. Never more than one part and a table of counts
    [channels, bins] is held.

    Args:
        parts: This process's tokens [tokens, channels]; may be empty.
        lowest: Smallest value of each channel over all processes, [channels].
        highest: Largest value of each channel, [channels].
        shares: p in (0.5, 1]; 1 gives lowest and highest.
        bins: At least 1.
    """
    channels = len(lowest)
    width = (highest.double() - lowest.double()) / bins
    width = torch.where(width > 0, width, 1.0)
    counts = torch.zeros(channels * bins, dtype=torch.int64, device=lowest.device)
    row = torch.arange(channels, device=lowest.device) * bins
    for tokens in parts:
        place = ((tokens.double() - lowest) / width).long().clamp_(0, bins - 1)
        counts += torch.bincount((place + row).flatten(), minlength=channels * bins)
    cumulated = ranks.total(counts).view(channels, bins).cumsum(1)
    total = cumulated[:, -1:].double()
    found = []
    for share in shares:
        if share == 1:
            found.append((lowest.float(), highest.float()))
            continue
        # The first bin that reaches beyond the lower tail, and the one that completes the upper.
        below = (cumulated <= (1 - share) * total).sum(1).clamp(max=bins - 1)
        above = (cumulated < share * total).sum(1) + 1
        ends = (lowest + below * width, torch.minimum(lowest + above * width, highest.double()))
        found.append((ends[0].float(), ends[1].float()))
    return found
