"""What the ranks found out, brought together in the order of the prompts.

Prompt i went to rank i % world, so that taking from each rank in turn restores the order.
"""

import json
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed
from torch.nn import functional

from recon.calibration import ranks

Item = TypeVar("Item")


def gather_rows(rows: list[dict[str, Any]], device: torch.device) -> list[dict[str, Any]]:
    """The rows of all ranks on every rank, in the order of the prompts."""
    # As bytes of JSON: collectives of objects would pickle.
    local = torch.tensor(list(json.dumps(rows).encode()), dtype=torch.uint8)
    return in_turn([json.loads(bytes(s.tolist()).decode()) for s in shares(local, device)])


def gather_tensor(local: Tensor, device: torch.device) -> Tensor:
    """The rows [rows, ...] of all ranks on every rank, on the CPU, in the order of the prompts.

    A rank may have no rows, but its tensor has the others' type and further axes.
    """
    return torch.stack(in_turn([list(share) for share in shares(local, device)]))


def shares(local: Tensor, device: torch.device) -> list[Tensor]:
    """Each rank's tensor [rows, ...], whose number of rows may differ; on the CPU.

    Args:
        local: This rank's.
        device: Where the process group can send from.
    """
    if not ranks.active():
        return [local.cpu()]
    local = local.to(device)
    sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(ranks.world())]
    distributed.all_gather(sizes, torch.tensor([len(local)], device=device))
    missing = max(map(int, sizes)) - len(local)
    padded = functional.pad(local, (*(0, 0) * (local.ndim - 1), 0, missing))
    parts = [torch.empty_like(padded) for _ in sizes]
    distributed.all_gather(parts, padded)
    return [part[: int(size)].cpu() for part, size in zip(parts, sizes, strict=True)]


def in_turn(lists: Sequence[Sequence[Item]]) -> list[Item]:
    """The first of each list, then the second of each, and so on.

    >>> in_turn([[0, 2, 4], [1, 3]])
    [0, 1, 2, 3, 4]
    """
    longest = max(map(len, lists))
    return [share[i] for i in range(longest) for share in lists if i < len(share)]
