"""WeightStore: layouts it reads, files it refuses."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from recon.errors import WeightsError
from recon.models.weights import FINGERPRINT_BYTES, WeightStore
from tests.models.tiny import write_tiny_cogvideox

NAME = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tensors = {"a.weight": torch.arange(6.0).view(2, 3), "a.count": torch.tensor([3])}
    save_file({**tensors, "b.weight": torch.ones(4).half()}, tmp_path / NAME)
    return tmp_path


def test_single_file_is_read_by_prefix(folder: Path) -> None:
    store = WeightStore(folder)
    store.check()
    assert store.keys() == ("a.count", "a.weight", "b.weight")
    loaded = store.load("a", torch.bfloat16, "cpu")
    assert loaded["weight"].dtype == torch.bfloat16
    assert torch.equal(loaded["weight"].float(), torch.arange(6.0).view(2, 3))
    assert loaded["count"].dtype == torch.int64  # not a floating tensor
    assert store.load("", torch.float32, "cpu").keys() == set(store.keys())
    assert store.dtype() == torch.float32
    assert store.variant is None


def test_loaded_tensors_outlive_the_file(folder: Path) -> None:
    loaded = WeightStore(folder).load("a", torch.float32, "cpu")
    (folder / NAME).write_bytes(b"")
    assert loaded["weight"].sum() == 15


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("size", ["10GB", "20KB"])
def test_shards_and_variants_are_found(tmp_path: Path, size: str, variant: str | None) -> None:
    folder = write_tiny_cogvideox(tmp_path, max_shard_size=size, variant=variant) / "transformer"
    files = sorted(folder.glob("*.safetensors"))
    assert (len(files) > 1) == (size == "20KB")
    store = WeightStore(folder)
    store.check()
    assert store.variant == variant
    expected = {k: v for file in files for k, v in load_file(file).items()}
    loaded = store.load("", torch.float32, "cpu")
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[key], expected[key]) for key in loaded)


def test_the_plain_file_is_preferred_to_a_variant(folder: Path) -> None:
    save_file({"c": torch.ones(1)}, folder / "diffusion_pytorch_model.fp16.safetensors")
    assert WeightStore(folder).variant is None
    assert "a.weight" in WeightStore(folder).keys()  # noqa: SIM118 - a method, not a mapping


def test_fingerprint_sees_ends_and_header_and_is_stable(folder: Path) -> None:
    first = WeightStore(folder).fingerprint()
    assert WeightStore(folder).fingerprint() == first
    content = bytearray((folder / NAME).read_bytes())
    content[-1] ^= 1
    (folder / NAME).write_bytes(content)
    assert WeightStore(folder).fingerprint() != first


def test_fingerprint_does_not_see_the_middle_as_documented(tmp_path: Path) -> None:
    big = torch.zeros(3 * FINGERPRINT_BYTES, dtype=torch.uint8)
    save_file({"w": big}, tmp_path / NAME)
    first = WeightStore(tmp_path).fingerprint()
    big[3 * FINGERPRINT_BYTES // 2] = 1
    save_file({"w": big}, tmp_path / NAME)
    assert WeightStore(tmp_path).fingerprint() == first
    big[5] = 1
    save_file({"w": big}, tmp_path / NAME)
    assert WeightStore(tmp_path).fingerprint() != first


def test_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"holds no safetensors file; looked for diffusion_py"):
        WeightStore(tmp_path).check()


def test_several_files_without_an_index_are_refused(tmp_path: Path) -> None:
    for name in ("one", "two"):
        save_file({name: torch.ones(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(WeightsError, match=r"holds \['one\.safetensors', 'two\.safetensors'\] and"):
        WeightStore(tmp_path).check()


def test_a_file_cut_short_is_refused_with_both_sizes(folder: Path) -> None:
    file = folder / NAME
    whole = file.read_bytes()
    file.write_bytes(whole[:-5])
    pattern = rf"must have {len(whole)} bytes by its header, and has {len(whole) - 5}"
    with pytest.raises(WeightsError, match=pattern):
        WeightStore(folder).check()
    file.write_bytes(whole[:40])
    with pytest.raises(
        WeightsError, match=r"must have at least \d+ bytes by its header, and has 40"
    ):
        WeightStore(folder).check()
    file.write_bytes(whole + b"x")
    with pytest.raises(WeightsError, match="cut short or changed"):
        WeightStore(folder).check()


@pytest.mark.parametrize("content", [b"", b"short", b"<html><body>not found</body></html>"])
def test_a_foreign_file_is_refused(folder: Path, content: bytes) -> None:
    (folder / NAME).write_bytes(content)
    with pytest.raises(WeightsError, match=rf"\({len(content)} bytes\) is not a safetensors file"):
        WeightStore(folder).check()


def test_a_header_that_is_not_json_is_refused(folder: Path) -> None:
    (folder / NAME).write_bytes((4).to_bytes(8, "little") + b"{abc")
    with pytest.raises(WeightsError, match="is not a safetensors file: JSONDecodeError"):
        WeightStore(folder).check()


def test_a_git_lfs_pointer_is_recognised(folder: Path) -> None:
    (folder / NAME).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(WeightsError, match="is a git-lfs pointer of 56 bytes"):
        WeightStore(folder).check()


def test_missing_shards_and_foreign_indices_are_refused(tmp_path: Path) -> None:
    folder = write_tiny_cogvideox(tmp_path, max_shard_size="20KB") / "transformer"
    index = folder / f"{NAME}.index.json"
    shard = sorted(folder.glob("*.safetensors"))[1]
    held = shard.read_bytes()
    shard.unlink()
    with pytest.raises(WeightsError, match=rf"{shard.name} is missing, though the index names it"):
        WeightStore(folder).check()
    shard.write_bytes(held)
    content = json.loads(index.read_text())
    content["weight_map"]["ghost"] = shard.name
    index.write_text(json.dumps(content))
    with pytest.raises(WeightsError, match=rf"places ghost in {shard.name}, which does not hold"):
        WeightStore(folder).check()
    index.write_text("{}")
    with pytest.raises(WeightsError, match="is not a safetensors index"):
        WeightStore(folder).check()


def test_missing_tensors_and_other_shapes_are_refused(folder: Path) -> None:
    store = WeightStore(folder)
    with pytest.raises(WeightsError, match="lacks 1 tensors of the network, the first 'z'"):
        store.check_fits({"a.weight": (2, 3), "z": (1,)})
    with pytest.raises(WeightsError, match=r"a\.weight has the shape \[2, 3\] in .*, and \[3, 2\]"):
        store.check_fits({"a.weight": (3, 2)})
    with pytest.raises(WeightsError, match="holds no tensor below 'q'; it has 3 tensors"):
        store.load("q", torch.float32, "cpu")
    with pytest.raises(WeightsError, match="lacks 1 tensors"):
        store.load_names(["y"], torch.float32, "cpu")


def test_a_file_damaged_after_the_check_is_refused_at_reading(folder: Path) -> None:
    store = WeightStore(folder)
    store.check()
    whole = (folder / NAME).read_bytes()
    (folder / NAME).write_bytes(whole[:-5])
    with pytest.raises(WeightsError, match=r"cannot be read: .*Fetch the file again"):
        store.load("a", torch.float32, "cpu")
