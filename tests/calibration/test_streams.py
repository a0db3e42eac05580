"""Streams in memory and on disk: exact, complete or not there, within their budget."""

import errno
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from recon.calibration import streams
from recon.calibration.memory import MemoryBudget, Place, free_bytes, parse_bytes
from recon.calibration.streams import DiskStreams, MemoryStreams, StreamStore
from recon.errors import BudgetError, ConfigError
from recon.types import State

CPU = torch.device("cpu")
STREAMS = ("teacher", "student")
PLENTY = 10**9


def state(seed: int) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(1, 6, 8, generator=generator),
        "encoder_hidden_states": torch.randn(1, 3, 8, generator=generator).bfloat16(),
    }


SIZE = sum(tensor.nbytes for tensor in state(0).values())


def fill(store: StreamStore, boundary: int, samples: int = 3) -> None:
    for number, stream in enumerate(STREAMS):
        for sample in range(samples):
            store.put(boundary, stream, sample, state(100 * boundary + 10 * number + sample))
        store.finish(boundary, stream)


def same(one: State, other: State) -> bool:
    def bits(tensor: Tensor) -> Tensor:
        return tensor.view(torch.uint8)

    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(bits(one[name]), bits(other[name]))
        for name in one
    )


@pytest.fixture
def disk(tmp_path: Path) -> DiskStreams:
    return DiskStreams(tmp_path / "streams", "a run", PLENTY)


def test_what_is_put_comes_back_bit_for_bit(disk: DiskStreams) -> None:
    for store in (disk, MemoryStreams(CPU)):
        odd = state(1)
        odd["hidden_states"][0, 0, :3] = torch.tensor([float("inf"), -0.0, 1e-42])
        view = {name: tensor.transpose(1, 2) for name, tensor in odd.items()}
        store.put(0, "teacher", 0, odd)
        store.put(0, "teacher", 1, view)
        assert same(store.get(0, "teacher", 0, CPU), odd)
        assert all(torch.equal(store.get(0, "teacher", 1, CPU)[n], view[n]) for n in view)


def test_memory_is_never_restorable(disk: DiskStreams) -> None:
    store = MemoryStreams(CPU)
    fill(store, 2)
    assert not store.restorable(2, STREAMS)


def test_another_process_of_the_same_run_reopens_the_streams(
    disk: DiskStreams, tmp_path: Path
) -> None:
    fill(disk, 2)
    again = DiskStreams(tmp_path / "streams", "a run", PLENTY)
    assert again.restorable(2, STREAMS)
    assert same(again.get(2, "student", 1, CPU), state(211))
    assert not again.restorable(1, STREAMS)
    assert not again.restorable(2, (*STREAMS, "nearest"))
    assert not DiskStreams(tmp_path / "streams", "another", PLENTY).restorable(2, STREAMS)


def test_the_marker_is_written_last_and_holds_every_checksum(
    disk: DiskStreams, tmp_path: Path
) -> None:
    place = tmp_path / "streams" / "boundary=001" / "teacher"
    for sample in range(2):
        disk.put(1, "teacher", sample, state(sample))
    assert not disk.restorable(1, ("teacher",))
    assert not (place / "complete.json").exists()
    disk.finish(1, "teacher")
    assert disk.restorable(1, ("teacher",))
    content = json.loads((place / "complete.json").read_text())
    assert sorted(content["shards"]) == ["00000.safetensors", "00001.safetensors"]
    assert content["bytes"] == 2 * SIZE
    assert not list(place.glob(".partial.*"))


@pytest.mark.parametrize("damage", ["flipped", "shortened", "removed"])
def test_a_damaged_shard_makes_the_boundary_unrestorable(
    disk: DiskStreams, tmp_path: Path, damage: str
) -> None:
    fill(disk, 1)
    shard = tmp_path / "streams" / "boundary=001" / "student" / "00001.safetensors"
    content = bytearray(shard.read_bytes())
    if damage == "flipped":
        content[-1] ^= 1
        shard.write_bytes(content)
    elif damage == "shortened":
        shard.write_bytes(content[:-4])
    else:
        shard.unlink()
    again = DiskStreams(tmp_path / "streams", "a run", PLENTY)
    assert again.restorable(1, ("teacher",))
    assert not again.restorable(1, STREAMS)


def test_one_generation_is_kept_for_the_checkpoint_before(
    disk: DiskStreams, tmp_path: Path
) -> None:
    for boundary in range(4):
        fill(disk, boundary)
    disk.drop_before(3)
    left = sorted(folder.name for folder in (tmp_path / "streams").iterdir())
    assert left == ["boundary=002", "boundary=003"]
    assert disk.restorable(2, STREAMS)
    disk.close()
    assert not (tmp_path / "streams").exists()


def test_memory_drops_at_once_what_no_unit_needs() -> None:
    store = MemoryStreams(CPU)
    for boundary in range(3):
        fill(store, boundary)
    store.drop_before(2)
    assert same(store.get(2, "teacher", 0, CPU), state(200))
    with pytest.raises(KeyError):
        store.get(1, "teacher", 0, CPU)


def test_a_budget_that_is_exceeded_names_the_field(tmp_path: Path) -> None:
    store = DiskStreams(tmp_path / "streams", "a run", 3 * SIZE)
    for sample in range(3):
        store.put(0, "teacher", sample, state(sample))
    with pytest.raises(
        BudgetError, match=r"memory\.disk \(.* bytes\) at 00003.*Raise memory\.disk"
    ):
        store.put(0, "teacher", 3, state(3))


def test_a_walk_stays_within_three_generations_resumed_or_not(tmp_path: Path) -> None:
    generation = len(STREAMS) * 3 * SIZE
    store = DiskStreams(tmp_path / "streams", "a run", 3 * generation)
    for boundary in range(4):
        fill(store, boundary)
        store.drop_before(boundary)
    again = DiskStreams(tmp_path / "streams", "a run", 3 * generation)
    assert again.restorable(3, STREAMS)  # what is there counts, headers of files do not
    for boundary in range(4, 8):
        fill(again, boundary)
        again.drop_before(boundary)


def test_a_boundary_found_damaged_is_not_counted_as_present(tmp_path: Path) -> None:
    generation = len(STREAMS) * 3 * SIZE
    fill(DiskStreams(tmp_path / "streams", "a run", PLENTY), 1)
    (tmp_path / "streams" / "boundary=001" / "student" / "00000.safetensors").unlink()
    again = DiskStreams(tmp_path / "streams", "a run", generation)
    assert not again.restorable(1, STREAMS)
    fill(again, 1)


def test_a_full_disk_is_named_and_leaves_no_half_shard(
    disk: DiskStreams, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(tensors: State, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(streams, "save_file", full)
    with pytest.raises(BudgetError, match=r"No space left on device\. Free disk space"):
        disk.put(0, "teacher", 0, state(0))
    assert not list((tmp_path / "streams").rglob("*.safetensors"))


# Budgets


def test_bytes_are_read_as_people_write_them() -> None:
    assert parse_bytes("512MiB") == 512 * 2**20
    assert parse_bytes("1.5 GB") == 1_500_000_000
    assert parse_bytes(0) == 0
    with pytest.raises(ConfigError, match="'lots' is no number of bytes"):
        MemoryBudget(ram="lots")


def test_the_first_place_with_room_is_taken(tmp_path: Path) -> None:
    needed = {"device": 400, "ram": 400, "disk": 600}
    budget = MemoryBudget(device=10**6, ram=400, disk=600)
    assert budget.place(needed, CPU, tmp_path) == "ram"  # type: ignore[arg-type]
    budget = MemoryBudget(ram=399, disk=600)
    assert budget.place(needed, CPU, tmp_path / "not" / "there") == "disk"  # type: ignore[arg-type]


def test_streams_that_fit_nowhere_name_every_field(tmp_path: Path) -> None:
    budget = MemoryBudget(device=0, ram=10, disk="100")
    with pytest.raises(
        BudgetError, match=r"memory\.ram allows 10 of 4,000.*disk allows 100 of 6,0"
    ):
        budget.place({"device": 4000, "ram": 4000, "disk": 6000}, CPU, tmp_path)


def test_processes_of_a_machine_share_what_is_free(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("recon.calibration.memory.free_bytes", lambda *unused: 1000)
    needed: dict[Place, int] = {"device": 400, "ram": 400, "disk": 600}
    budget = MemoryBudget(device=0)
    assert budget.place(needed, CPU, tmp_path, 1) == "ram"
    with pytest.raises(BudgetError, match=r"memory\.ram allows 250 .*memory\.disk allows 400 "):
        budget.place(needed, CPU, tmp_path, 2)


@pytest.mark.skipif(sys.platform != "linux", reason="Others do not say.")
def test_what_linux_would_give_back_counts_as_free(tmp_path: Path) -> None:
    (kilobytes,) = re.findall(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())
    assert free_bytes("ram", CPU, tmp_path) == pytest.approx(1024 * int(kilobytes), rel=0.2)
