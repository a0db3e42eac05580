"""Choosing where the carried streams of a run live."""

from pathlib import Path

import torch

from recon.calibration import ranks
from recon.calibration.memory import MemoryBudget, Place, parse_bytes
from recon.calibration.streams import DiskStreams, MemoryStreams, StreamStore

FOLDER = "streams"

# Boundaries alive at once: teacher's inputs and targets, student's inputs and outputs. On disk
# the boundary before is kept too, until a checkpoint of the present one is sure to exist.
_COPIES: dict[Place, int] = {"device": 4, "ram": 4, "disk": 6}


def needed_bytes(
    sample_bytes: int,
    samples: int,
    held_out: int,
    further: int = 0,
    world: int | None = None,
) -> dict[Place, int]:
    """Bytes that one process's streams take in each place.

    Args:
        sample_bytes: Streamed tensors of one sample at one boundary.
        samples: Calibration samples over all processes.
        held_out: Held-out samples, which carry the round-to-nearest stream too.
        further: Boundaries a method keeps beside the carried ones, for every sample.
        world: Processes; None: those that are running.
    """
    world = ranks.world() if world is None else world
    mine = -(-samples // world) + -(-held_out // world)
    extra = -(-held_out // world)
    return {
        place: sample_bytes * ((copies + further) * mine + copies // 2 * extra)
        for place, copies in _COPIES.items()
    }


def stream_store(
    budget: MemoryBudget,
    needed: dict[Place, int],
    device: torch.device,
    root: Path,
    fingerprint: str,
) -> StreamStore:
    """The store for a run, in the first place with room.

    Raises:
        BudgetError: No place has room.
    """
    place = budget.place(needed, device, root)
    if place == "device":
        return MemoryStreams(device)
    if place == "ram":
        return MemoryStreams(torch.device("cpu"), pinned=device.type == "cuda")
    folder = root / FOLDER / f"rank={ranks.rank()}-of-{ranks.world()}"
    limit = needed["disk"] if budget.disk == "auto" else parse_bytes(budget.disk)
    return DiskStreams(folder, fingerprint, limit)
