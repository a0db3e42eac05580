"""Bad input on images: the list of test_bad_input.py, and what only images can get wrong."""

import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from recon.cli import main
from tests.cli.command import contents, image_arguments

Call = Callable[[list[str]], tuple[int, str]]

FAITHFUL = "ptq4dit_faithful"
KEYS: list[tuple[str, str, str, str]] = [
    ("ptq4dit", "--model.nonsense", "3", "Option 'nonsense' is not accepted"),
    ("ptq4dit", "--data.nonsense", "3", "Option 'nonsense' is not accepted"),
    ("ptq4dit", "--trainer.nonsense", "3", "unrecognized arguments: --trainer.nonsense 3"),
    ("ptq4dit", "--model.weight.num_bits", "1", "num_bits must lie in [2, 8], got 1"),
    ("ptq4dit", "--model.weight.num_bits", "9", "num_bits must lie in [2, 8], got 9"),
    (FAITHFUL, "--model.activation.num_bits", "9", "num_bits must lie in [2, 8], got 9"),
    (FAITHFUL, "--model.softmax_bits", "1", "model.softmax_bits must lie in [2, 8], got 1"),
    ("ptq4dit", "--model.balance", "ssc", "Expected a typing.Literal['csb', 'none']"),
    ("ptq4dit", "--model.grid", "1", "model.grid must be at least 2, got 1"),
    ("ptq4dit", "--model.batch_size", "8", "6 calibration samples cannot fill a batch of 8"),
    ("ptq4dit", "--model.micro_batch", "3", "4 does not divide into micro-batches of 3"),
    ("ptq4dit", "--model.adapter.folder", "/nowhere", "DiT.folder is '/nowhere'"),
    ("ptq4dit", "--data.classes", "[9]", "data.classes holds 9, which is none of the 6 classes"),
    ("ptq4dit", "--data.classes", "[-1]", "data.classes holds -1, which is none of the 6 classes"),
    ("ptq4dit", "--data.classes", "[]", "data.classes is empty"),
    ("ptq4dit", "--data.steps", "7", "steps is 7, which does not divide 1000"),
    ("ptq4dit", "--data.timesteps", "1", "timesteps must be at least 2, got 1"),
    ("ptq4dit", "--data.num_trajectories", "1", "1 of 5 steps give only 5 candidates"),
    ("ptq4dit", "--data.held_out_samples", "99", "held_out_samples is 99, but 8"),
    ("ptq4dit", "--data.guidance", "1", "guidance 1.0 runs no unconditional branch"),
    ("ptq4dit", "--metrics.distribution.drawn", "0", "drawn must be at least 2, got 0"),
    ("ptq4dit", "--trainer.max_epochs", "3", "trainer.max_epochs is 3"),
    ("ptq4dit", "--trainer.strategy", "ddp", "DDPStrategy fixes that set"),
    ("ptq4dit", "--trainer.devices", "8", "batch_size 4 does not divide among 8 processes"),
    ("ptq4dit", "--model.memory", "{device: 0, ram: 0, disk: 1000}", "memory.disk allows 1,000"),
]


def refused(
    recon: Call, arguments: list[str], message: str, *, nothing_in: Path | None = None
) -> None:
    """The command ends with a sentence that holds `message`, soon, and writes nothing."""
    started = time.process_time()  # other work on the machine must not decide
    status, printed = recon(arguments)
    assert time.process_time() - started < 10
    assert status == 2
    assert message in printed
    assert "Traceback" not in printed
    assert "\nrecon: " in f"\n{printed}"
    if nothing_in is not None:
        assert not nothing_in.exists()


@pytest.mark.parametrize(
    ("config", "key", "value", "message"), KEYS, ids=lambda value: str(value)[:30]
)
def test_a_wrong_value_is_named_and_nothing_is_written(
    config: str, key: str, value: str, message: str, recon: Call, images: Path, tmp_path: Path
) -> None:
    root = tmp_path / "run"
    arguments = [*image_arguments(root, images, config=config), key, value]
    refused(recon, arguments, message, nothing_in=root)
    assert not list((tmp_path / "here").iterdir())


@pytest.mark.parametrize("part", ["transformer", "vae"])
@pytest.mark.parametrize("damage", ["missing", "cut short"])
def test_weights_that_are_damaged(
    damage: str, part: str, recon: Call, images: Path, tmp_path: Path
) -> None:
    shutil.copytree(images, tmp_path / "teacher")
    (weights,) = (tmp_path / "teacher" / part).glob("*.safetensors")
    if damage == "missing":
        weights.unlink()
    else:
        weights.write_bytes(weights.read_bytes()[:-100])
    root = tmp_path / "run"
    refused(recon, image_arguments(root, tmp_path / "teacher"), part, nothing_in=root)


def test_latents_that_are_not_numbers_stop_the_run_and_leave_no_set(
    recon: Call, images: Path, tmp_path: Path
) -> None:
    shutil.copytree(images, tmp_path / "teacher")
    (weights,) = (tmp_path / "teacher" / "transformer").glob("*.safetensors")
    tensors = load_file(weights)
    tensors["proj_out_2.bias"] = torch.full_like(tensors["proj_out_2.bias"], torch.nan)
    save_file(tensors, weights, {"format": "pt"})
    root = tmp_path / "run"
    refused(recon, image_arguments(root, tmp_path / "teacher"), "holds NaN or Inf")
    assert not list(root.rglob("*.arrow"))
    assert not list(root.rglob("*.ckpt"))
    assert not (root / "calibration").exists()


def test_a_run_folder_that_cannot_be_written(recon: Call, images: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    root = tmp_path / "file" / "run"
    refused(recon, image_arguments(root, images), "cannot be written")
    assert (tmp_path / "file").read_text() == ""


# Checkpoints


@pytest.fixture(scope="module")
def finished_images(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("finished") / "run"
    argv, before = list(sys.argv), Path.cwd()
    os.chdir(root.parent)
    try:
        main([*image_arguments(root, images), "--media.after_fit", "0"])
    finally:
        sys.argv[:] = argv
        os.chdir(before)
    return root


@pytest.fixture
def taken(finished_images: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished_images, tmp_path / "run")
    return tmp_path / "run"


def test_a_checkpoint_cut_short(recon: Call, images: Path, taken: Path) -> None:
    (checkpoint,) = (taken / "checkpoints").glob("*.ckpt")
    checkpoint.write_bytes(checkpoint.read_bytes()[:5000])
    before = contents(taken)
    message = "(5,000 bytes) cannot be read, it is damaged or cut short"
    refused(recon, [*image_arguments(taken, images), "--ckpt_path", "last"], message)
    assert contents(taken) == before


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("--model.salience", "max", "model.salience: saved 'ssc', now 'max'"),
        ("--model.quantize_attention", "true", "model.quantize_attention: saved False, now True"),
        ("--model.adapter.norm3_eps", "1e-6", "teacher.protocol: saved"),
    ],
)
def test_a_checkpoint_of_another_configuration(
    key: str, value: str, message: str, recon: Call, images: Path, taken: Path
) -> None:
    before = contents(taken)
    arguments = [*image_arguments(taken, images), key, value, "--ckpt_path", "last"]
    refused(recon, arguments, message)
    assert contents(taken) == before


def test_a_calibration_set_of_another_protocol(
    recon: Call, images: Path, taken: Path, tmp_path: Path
) -> None:
    before = contents(taken)
    root = tmp_path / "other"
    shared = ("--data.folder", str(taken / "calibration"), "--data.guidance", "3")
    status, printed = recon([*image_arguments(root, images), *shared])
    assert status == 2
    assert "guidance" in printed
    assert "Traceback" not in printed
    assert contents(taken) == before
    assert not (root / "checkpoints").exists()
