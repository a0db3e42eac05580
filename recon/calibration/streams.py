"""Storage of the carried streams: one dictionary of tensors per sample, stream and boundary."""

import hashlib
import json
import shutil
from abc import ABC, abstractmethod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from recon.atomic import write_json
from recon.errors import BudgetError
from recon.types import State


class StreamStore(ABC):
    """Activations at unit boundaries. Boundary k is what enters unit k."""

    @abstractmethod
    def put(self, boundary: int, stream: str, sample: int, state: State) -> None:
        """Keeps a copy of `state`."""

    @abstractmethod
    def get(self, boundary: int, stream: str, sample: int, device: torch.device) -> State:
        """What was put, on `device`."""

    @abstractmethod
    def finish(self, boundary: int, stream: str) -> None:
        """Declares a stream of a boundary complete."""

    @abstractmethod
    def restorable(self, boundary: int, streams: tuple[str, ...]) -> bool:
        """Whether a new process can go on from `boundary` with these streams."""

    @abstractmethod
    def drop_before(self, boundary: int) -> None:
        """Forgets what no unit from `boundary` on needs."""

    @abstractmethod
    def close(self) -> None:
        """Forgets everything: the run is finished."""


class MemoryStreams(StreamStore):
    """Streams on the accelerator or in host memory (pinned where an accelerator reads it)."""

    def __init__(self, device: torch.device, *, pinned: bool = False) -> None:
        self._device, self._pinned = device, pinned
        self._states: dict[tuple[int, str, int], State] = {}

    def put(self, boundary: int, stream: str, sample: int, state: State) -> None:
        """See `StreamStore.put`."""
        kept = {name: _plain(tensor.detach()).to(self._device) for name, tensor in state.items()}
        if self._pinned:
            kept = {name: tensor.pin_memory() for name, tensor in kept.items()}
        self._states[boundary, stream, sample] = kept

    def get(self, boundary: int, stream: str, sample: int, device: torch.device) -> State:
        """See `StreamStore.get`."""
        state = self._states[boundary, stream, sample]
        return {name: t.to(device, non_blocking=self._pinned) for name, t in state.items()}

    def finish(self, boundary: int, stream: str) -> None:
        """Nothing to declare: memory dies with the process."""

    def restorable(self, boundary: int, streams: tuple[str, ...]) -> bool:
        """Never: memory dies with the process."""
        return False

    def drop_before(self, boundary: int) -> None:
        """See `StreamStore.drop_before`."""
        self._states = {key: state for key, state in self._states.items() if key[0] >= boundary}

    def close(self) -> None:
        """See `StreamStore.close`."""
        self._states.clear()


def _plain(tensor: Tensor) -> Tensor:
    """With the strides of its shape; a part of a larger tensor would also keep the whole of it.

    A compiled step looks at strides even of axes of length 1, and would be compiled anew behind the
    first unit.
    """
    strides = torch.empty(tensor.shape, device="meta").stride()
    if tensor.stride() == strides:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


class DiskStreams(StreamStore):
    """Streams in memory-mapped safetensors shards, one a sample, with checksums.

    A stream of a boundary counts only once its marker is there; the marker is written last, by
    rename, and holds the checksum of every shard and the fingerprint of the run.

    Args:
        folder: Where the shards go; made if missing.
        fingerprint: Of the run; shards of another run are not reopened.
        budget: Bytes that may be on disk at any time.
    """

    def __init__(self, folder: Path, fingerprint: str, budget: int) -> None:
        self._folder, self._fingerprint, self._budget = folder, fingerprint, budget
        self._sums: dict[tuple[int, str], dict[str, str]] = {}
        self._bytes: dict[tuple[int, str], int] = {}

    def _place(self, boundary: int, stream: str) -> Path:
        return self._folder / f"boundary={boundary:03d}" / stream

    def put(self, boundary: int, stream: str, sample: int, state: State) -> None:
        """See `StreamStore.put`.

        Raises:
            BudgetError: The budget or the disk is exhausted.
        """
        place = self._place(boundary, stream)
        place.mkdir(parents=True, exist_ok=True)
        shard = place / f"{sample:05d}.safetensors"
        kept = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
        size = sum(tensor.nbytes for tensor in kept.values())
        key = (boundary, stream)
        if shard.name in self._sums.get(key, {}):  # written over: it counts once
            self._bytes[key] -= size
        if sum(self._bytes.values()) + size > self._budget:
            raise BudgetError(
                f"The streams would exceed memory.disk ({self._budget:,} bytes) at {shard.name}. "
                "Raise memory.disk or calibrate with fewer samples."
            )
        try:
            save_file(kept, shard)
        except (OSError, SafetensorError) as error:
            shard.unlink(missing_ok=True)
            raise BudgetError(
                f"Writing {size:,} bytes to {shard} failed: {error}. Free disk space, or lower "
                "memory.disk so that the run refuses up front, and continue with --ckpt_path last."
            ) from error
        self._bytes[key] = self._bytes.get(key, 0) + size
        self._sums.setdefault(key, {})[shard.name] = _checksum(shard)

    def get(self, boundary: int, stream: str, sample: int, device: torch.device) -> State:
        """See `StreamStore.get`; the shard is memory-mapped, read as it is used."""
        shard = self._place(boundary, stream) / f"{sample:05d}.safetensors"
        with safe_open(shard, framework="pt") as file:
            return {name: file.get_tensor(name).to(device) for name in file.keys()}  # noqa: SIM118 (a safe_open is no mapping)

    def finish(self, boundary: int, stream: str) -> None:
        """Writes the marker."""
        marker = self._marker(boundary, stream)
        content = {
            "fingerprint": self._fingerprint,
            "shards": self._sums.get((boundary, stream), {}),
            "bytes": self._bytes.get((boundary, stream), 0),
        }
        write_json(marker, content)

    def restorable(self, boundary: int, streams: tuple[str, ...]) -> bool:
        """Whether every stream has a marker of this run and shards with the noted checksums."""
        found = {}
        for stream in streams:
            marker = self._marker(boundary, stream)
            if not marker.exists():
                return False
            content = json.loads(marker.read_text())
            place = self._place(boundary, stream)
            intact = content["fingerprint"] == self._fingerprint and all(
                (place / name).exists() and _checksum(place / name) == value
                for name, value in content["shards"].items()
            )
            if not intact:
                return False
            found[boundary, stream] = content["bytes"]
        self._bytes |= found
        return True

    def drop_before(self, boundary: int) -> None:
        """Keeps one boundary more than asked: the newest checkpoint may be of the one before."""
        for folder in self._folder.glob("boundary=*"):
            number = int(folder.name.removeprefix("boundary="))
            if number < boundary - 1:
                shutil.rmtree(folder)
        kept = self._bytes.items()
        self._bytes = {key: size for key, size in kept if key[0] >= boundary - 1}
        self._sums = {key: sums for key, sums in self._sums.items() if key in self._bytes}

    def close(self) -> None:
        """Removes the folder."""
        shutil.rmtree(self._folder, ignore_errors=True)
        self._sums.clear()
        self._bytes.clear()

    def _marker(self, boundary: int, stream: str) -> Path:
        return self._place(boundary, stream) / "complete.json"


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()
