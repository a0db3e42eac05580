"""Where the carried streams live: device, RAM or disk, by budget."""

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from recon.calibration import ranks
from recon.errors import BudgetError, ConfigError

Place = Literal["device", "ram", "disk"]

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}

_AUTO_SHARE = {"device": 0.25, "ram": 0.5, "disk": 0.8}
"""Shares of what is free that `auto` may take: a block and its step need the rest of the device."""


def parse_bytes(text: str | int) -> int:
    """Bytes in `text`, such as 4096, "512MiB" or "1.5 GB".

    Raises:
        ConfigError: The text is not a number of bytes.

    >>> parse_bytes("1.5 KiB")
    1536
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(text))
    if match is None or match[2].upper() not in _UNITS:
        raise ConfigError(
            f"{text!r} is no number of bytes. Write auto, 0, 4096, 512MiB, 1.5GB or the like."
        )
    return int(float(match[1]) * _UNITS[match[2].upper()])


@dataclass(frozen=True)
class MemoryBudget:
    """Bytes that the carried streams may take in each place; the first place they fit is used."""

    device: str | int = "auto"
    """Accelerator memory for the streams; auto: a quarter of what is free, none on a CPU."""
    ram: str | int = "auto"
    """Host memory for the streams of a process; auto: half of what is available, shared evenly
    among the processes of a machine."""
    disk: str | int = "auto"
    """Disk space under the run folder for the streams of a process; auto: four fifths of what is
    free, shared likewise."""

    def __post_init__(self) -> None:
        for value in (self.device, self.ram, self.disk):
            if value != "auto":
                parse_bytes(value)

    def place(
        self,
        needed: dict[Place, int],
        device: torch.device,
        folder: Path,
        processes: int | None = None,
    ) -> Place:
        """The first place in which `needed` bytes fit.

        Args:
            needed: Bytes the streams of a process take, for each place (disk keeps one generation
                more).
            device: Where the network computes.
            folder: The run folder; its nearest existing parent is asked for free space.
            processes: That share this machine; None: those that are running.

        Raises:
            BudgetError: They fit nowhere; names every budget and the field to change.
        """
        sharing = ranks.neighbours() if processes is None else processes
        allowed: dict[Place, int] = {
            "device": self._allowed("device", self.device, device, folder),
            "ram": self._allowed("ram", self.ram, device, folder, sharing),
            "disk": self._allowed("disk", self.disk, device, folder, sharing),
        }
        for place, limit in allowed.items():
            if needed[place] <= limit:
                return place
        table = ", ".join(f"memory.{p} allows {allowed[p]:,} of {needed[p]:,}" for p in allowed)
        raise BudgetError(
            f"The carried streams fit nowhere (bytes: {table}). Raise one of memory.device, "
            "memory.ram and memory.disk, or calibrate with fewer samples (data.sds.top_k)."
        )

    def _allowed(
        self,
        place: Place,
        value: str | int,
        device: torch.device,
        folder: Path,
        sharing: int = 1,
    ) -> int:
        free = free_bytes(place, device, folder)
        if value == "auto":
            return int(free * _AUTO_SHARE[place] / sharing)
        return min(parse_bytes(value), free)


def free_bytes(place: Place, device: torch.device, folder: Path) -> int:
    """Bytes that are free in a place now; of the disk that `folder` is or will be on."""
    if place == "device":
        return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
    if place == "ram":
        return _available_memory()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _available_memory() -> int:
    # Linux counts what it would give back, such as copies of weights that were read from disk.
    facts = Path("/proc/meminfo")
    found = re.search(r"MemAvailable:\s+(\d+) kB", facts.read_text()) if facts.exists() else None
    if found is not None:
        return 1024 * int(found[1])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
