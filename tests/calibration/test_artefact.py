"""The calibration set on disk: exact, complete or not there, and nobody else's."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from recon.calibration.artefact import MARKER, CalibrationSet, Row, digest, write_set
from recon.errors import CalibrationError, NumericsError
from recon.types import Sample

FINGERPRINT: dict[str, str | int | float | bool | None] = {
    "sds.top_k": 3,
    "teacher.weights": "abc",
    "guidance": 6.0,
}


def sample(index: int, batch: int = 2) -> Sample:
    generator = torch.Generator().manual_seed(index)
    latent = torch.randn(batch, 3, 4, 6, 5, generator=generator)
    text = torch.randn(batch, 7, 8, generator=generator)
    return {
        "hidden_states": latent.bfloat16(),
        "encoder_hidden_states": text.half(),
        "double": text.double(),
        "timestep": torch.tensor([999 - index] * batch),
    }


def rows(count: int = 5) -> Iterator[Row]:
    for index in range(count):
        held = index >= 3
        yield Row(
            sample(index),
            prompt=f"prompt {index}",
            step=index + 1,
            seed=100 + index,
            change=0.1 * index,
            gram=2.0 * index,
            score=None if held else 0.5,
            split="held_out" if held else "calibration",
            reason="Because.",
        )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    target = tmp_path / "run" / "calibration"
    write_set(target, rows, FINGERPRINT, {"histogram": {"1": 1}})
    return target


def test_every_tensor_returns_bit_for_bit(folder: Path) -> None:
    loaded = CalibrationSet.load(folder, FINGERPRINT)
    assert (len(loaded.samples), len(loaded.held_out)) == (3, 2)
    for index, got in enumerate([*loaded.samples, *loaded.held_out]):
        want = sample(index)
        assert set(got) == set(want)
        for name, tensor in want.items():
            assert got[name].dtype == tensor.dtype
            assert got[name].shape == tensor.shape
            assert torch.equal(got[name].view(torch.uint8), tensor.view(torch.uint8))


def test_rare_bit_patterns_survive(tmp_path: Path) -> None:
    # Subnormals, signed zero and the largest finite values, where a conversion would show.
    bits = torch.tensor([0x0001, 0x8000, 0x7F7F, 0xFF7F - 65536], dtype=torch.int32).short()
    odd: Sample = {"hidden_states": bits.view(torch.bfloat16), "empty": torch.empty(0, 2)}
    row = Row(odd, "p", 0, 0, 0.0, 0.0, 0.0, "calibration", "r")
    write_set(tmp_path / "set", lambda: [row], {}, {})
    got = CalibrationSet.load(tmp_path / "set").samples[0]
    assert torch.equal(got["hidden_states"].view(torch.int16), bits)
    assert got["empty"].shape == (0, 2)


def test_samples_are_a_sequence_and_know_their_origin(folder: Path) -> None:
    loaded = CalibrationSet.load(folder)
    assert torch.equal(loaded.samples[-1]["timestep"], loaded.samples[2]["timestep"])
    assert len(loaded.samples[1:]) == 2
    facts = loaded.held_out.facts(0)
    assert facts == {
        "prompt": "prompt 3", "step": 4, "seed": 103, "C_diff": pytest.approx(0.3),
        "C_quant": 6.0, "score": None, "split": "held_out", "reason": "Because.",
    }  # fmt: skip
    loaded.samples[0]["timestep"].add_(1)  # writable, and a copy
    assert loaded.samples[0]["timestep"].tolist() == [999, 999]


def test_datasets_opens_the_folder_without_recon(folder: Path) -> None:
    from datasets import load_from_disk

    table = load_from_disk(str(folder))
    assert table["prompt"][:2] == ["prompt 0", "prompt 1"]
    field = table[1]["hidden_states"]
    flat = torch.frombuffer(bytearray(field["data"]), dtype=getattr(torch, field["dtype"]))
    assert torch.equal(flat.view(field["shape"]), sample(1)["hidden_states"])


def test_the_fingerprint_is_independent_of_order_and_complete(folder: Path) -> None:
    assert CalibrationSet.load(folder).fingerprint == digest(
        dict(reversed(list(FINGERPRINT.items())))
    )
    assert digest(FINGERPRINT) != digest({**FINGERPRINT, "guidance": 6.5})
    content = json.loads((folder / MARKER).read_text())
    assert content["histogram"] == {"1": 1}
    assert set(content["versions"]) >= {"torch", "datasets"}


def test_nan_names_tensor_prompt_and_step_and_leaves_nothing(tmp_path: Path) -> None:
    def broken() -> Iterator[Row]:
        for row in rows():
            if row.step == 2:
                row.sample["hidden_states"][0, 0, 0, 0, 0] = torch.nan
            yield row

    with pytest.raises(NumericsError, match="hidden_states of prompt 'prompt 1', step 2"):
        write_set(tmp_path / "set", broken, FINGERPRINT, {})
    assert list(tmp_path.iterdir()) == []


def test_a_failed_rebuild_keeps_the_old_set(folder: Path) -> None:
    def broken() -> Iterator[Row]:
        yield next(rows())
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        write_set(folder, broken, FINGERPRINT, {})
    assert len(CalibrationSet.load(folder, FINGERPRINT).samples) == 3


def test_a_rebuild_replaces_the_old_set_and_leaves_no_trace(folder: Path) -> None:
    write_set(folder, lambda: rows(2), {"sds.top_k": 2}, {})
    assert len(CalibrationSet.load(folder, {"sds.top_k": 2}).samples) == 2
    assert [path.name for path in folder.parent.iterdir()] == ["calibration"]


@pytest.mark.parametrize("field", ["sds.top_k", "teacher.weights"])
def test_a_foreign_set_is_refused_by_field_and_values(folder: Path, field: str) -> None:
    present = {**FINGERPRINT, field: "other"}
    with pytest.raises(CalibrationError, match=rf"{field} was .{{1,5}}, is 'other'.*rebuild"):
        CalibrationSet.load(folder, present)


def test_a_new_setting_is_a_difference_even_when_null(folder: Path) -> None:
    with pytest.raises(CalibrationError, match=r"sds\.quota was None"):
        CalibrationSet.load(folder, {**FINGERPRINT, "sds.quota": None})


def test_a_missing_folder_and_an_unfinished_one_are_refused(folder: Path) -> None:
    with pytest.raises(CalibrationError, match="is not a folder"):
        CalibrationSet.load(folder / "none")
    (folder / MARKER).unlink()
    with pytest.raises(CalibrationError, match="written last"):
        CalibrationSet.load(folder)


def test_a_changed_byte_is_found(folder: Path) -> None:
    data = next(folder.glob("*.arrow"))
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    with pytest.raises(CalibrationError, match="sha256 is"):
        CalibrationSet.load(folder, FINGERPRINT)


def test_a_file_cut_short_or_missing_is_found(folder: Path) -> None:
    data = next(folder.glob("*.arrow"))
    data.write_bytes(data.read_bytes()[:-100])
    with pytest.raises(CalibrationError, match=r"bytes is \d+, saved as \d+"):
        CalibrationSet.load(folder)
    data.unlink()
    with pytest.raises(CalibrationError, match="bytes is None"):
        CalibrationSet.load(folder)


@pytest.mark.parametrize("text", ["{", "[]", '{"fingerprint": {}}', "\x00"])
def test_a_damaged_marker_is_refused(folder: Path, text: str) -> None:
    (folder / MARKER).write_text(text)
    with pytest.raises(CalibrationError, match="cannot be read"):
        CalibrationSet.load(folder)


def test_another_format_is_refused(folder: Path) -> None:
    content = json.loads((folder / MARKER).read_text())
    (folder / MARKER).write_text(json.dumps({**content, "format": 99}))
    with pytest.raises(CalibrationError, match="format 99"):
        CalibrationSet.load(folder)
