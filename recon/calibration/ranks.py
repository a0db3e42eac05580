"""Reductions over the processes of a run; without a process group each is the identity.

Only exact reductions are offered: maxima, and sums in float64. A float64 sum of float32 addends
loses no bit of the result that is rounded to float32 afterwards (up to rounding ties), so one
process and many take the same decisions.
"""

import os

import torch
from torch import Tensor, distributed


def active() -> bool:
    """Whether several processes take part."""
    return distributed.is_available() and distributed.is_initialized()


def rank() -> int:
    """Index of this process."""
    return distributed.get_rank() if active() else 0


def world() -> int:
    """Number of processes."""
    return distributed.get_world_size() if active() else 1


def neighbours() -> int:
    """Processes on this machine, as torchrun says; without it all are taken to be here."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world())) if active() else 1


def maximum(tensor: Tensor) -> Tensor:
    """Element-wise maximum over the processes, in place."""
    if active():
        distributed.all_reduce(tensor, op=distributed.ReduceOp.MAX)
    return tensor


def anywhere(fact: bool, device: torch.device) -> bool:
    """Whether it is so for any of the processes; all of them wait for each other.

    Args:
        fact: Of this process.
        device: Where the processes meet.
    """
    return bool(maximum(torch.tensor(float(fact), device=device)).item())


def total(tensor: Tensor) -> Tensor:
    """Sum over the processes, in place; float64 or integers only."""
    assert tensor.dtype in (torch.float64, torch.int64), tensor.dtype
    if active():
        distributed.all_reduce(tensor)
    return tensor


def barrier() -> None:
    """Returns once every process is here."""
    if active():
        distributed.barrier()
