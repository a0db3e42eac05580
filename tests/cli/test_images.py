"""Image transformers from the command line, on a tiny random DiT of DiT-XL's layout."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.command import CONFIGS, codes, finished
from tests.models.tiny import write_tiny_dit

Call = Callable[[list[str]], tuple[int, str]]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    return write_tiny_dit(folder, layers=2, classes=6, pipeline=True)


def arguments(
    root: Path, teacher: Path, *more: str, config: str = "ptq4dit", steps: int | None = 5
) -> list[str]:
    return [
        *("fit", "--config", str(CONFIGS / f"{config}.yaml"), *more),
        *("--trainer.default_root_dir", str(root), "--trainer.accelerator", "cpu"),
        *("--wandb", "false", "--media.after_fit", "2", "--media.count", "2"),
        *("--model.adapter.init_args.folder", str(teacher)),
        *(() if steps is None else ("--model.steps", str(steps))),
        *("--model.batch_size", "4", "--model.micro_batch", "2"),
        *("--data.timesteps", "3", "--data.samples_per_timestep", "2"),
        *("--data.steps", "5", "--data.held_out_samples", "3"),
        *("--data.num_test_images", "4", "--data.test_batch_size", "3"),
    ]


@pytest.mark.parametrize("config", ["ptq4dit", "ptq4dit_faithful"])
def test_fit_test_and_predict_on_images(
    config: str, recon: Call, teacher: Path, tmp_path: Path
) -> None:
    root = tmp_path / "run"
    status, printed = recon(arguments(root, teacher, config=config))
    assert status == 0, printed
    summary = json.loads((root / "summary.json").read_text())
    assert summary["method"] == "PTQ4DiT"
    assert summary["block_forwards_per_sample"] == 4  # two blocks
    assert 0 < summary["error"]["reconstructed"] < 1
    assert len(list((root / "samples").glob("fit_*.png"))) == 2
    status, printed = recon(["test", "--run", str(root)])
    assert status == 0, printed
    result = json.loads((root / "test.json").read_text())
    assert result["paired"]["count"] == 4
    assert "temporal_consistency" not in result["paired"]
    assert len(result["samples"]) == 4
    assert len(list((root / "samples").glob("test_*.png"))) == 2
    status, printed = recon(["predict", "--run", str(root)])
    assert status == 0, printed
    assert len(list((root / "predictions").glob("*.png"))) == 4


@pytest.mark.parametrize(
    ("config", "steps"), [("rtn", None), ("smoothquant", None), ("gptq", None), ("adaround", 5)]
)
def test_the_baselines_run_on_images(
    config: str, steps: int | None, recon: Call, teacher: Path, tmp_path: Path
) -> None:
    root = tmp_path / "run"
    overlay = ("--config", str(CONFIGS / "models" / "image_teacher.yaml"))
    status, printed = recon(arguments(root, teacher, *overlay, config=config, steps=steps))
    assert status == 0, printed
    summary = json.loads((root / "summary.json").read_text())
    assert summary["bits"] == {"weight": 4, "activation": 8}
    assert 0 < summary["error"]["reconstructed"] < 1
    assert len(list((root / "samples").glob("fit_*.png"))) == 2


@pytest.mark.distributed
@pytest.mark.parametrize("attention", ["false", "true"])
@pytest.mark.parametrize("config", ["ptq4dit", "ptq4dit_faithful"])
def test_two_processes_leave_the_bytes_of_one(
    config: str, attention: str, teacher: Path, tmp_path: Path
) -> None:
    written = []
    for count in ("1", "2"):
        root = tmp_path / count / "run"
        more = ("--model.quantize_attention", attention, "--media.after_fit", "0")
        fit = [*arguments(root, teacher, config=config), *more]
        assert finished([*fit, "--trainer.devices", count], root.parent / "log") == 0
        written.append(codes(root))
    assert written[0] == written[1]


def test_the_configuration_of_the_real_model_needs_its_folder_and_takes_one_of_its_layout(
    recon: Call, teacher: Path, tmp_path: Path
) -> None:
    real = str(CONFIGS / "models" / "dit_xl_2_256.yaml")
    base = ["fit", "--config", str(CONFIGS / "ptq4dit.yaml"), "--config", real]
    root = tmp_path / "run"
    status, printed = recon([*base, "--trainer.default_root_dir", str(root), "--wandb", "false"])
    assert status == 2
    for word in ("DiT-XL-2-256", "facebook/DiT-XL-2-256", "hf download"):
        assert word in printed
    assert not root.exists()
    own = tmp_path / "own.yaml"  # nested this deep, jsonargparse takes a null of the shell as text
    own.write_text("model: {init_args: {adapter: {init_args: {vae: null}}}}")
    status, printed = recon(arguments(root, teacher, "--config", real, "--config", str(own)))
    assert status == 0, printed
    assert (root / "quantized" / "manifest.json").is_file()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("--data.classes", "[9]", "data.classes holds 9, which is none of the 6 classes"),
        ("--data.steps", "7", "steps is 7, which does not divide 1000"),
        ("--model.micro_batch", "3", "4 does not divide into micro-batches of 3"),
        ("--model.grid", "1", "model.grid must be at least 2, got 1"),
        ("--data.timesteps", "1", "timesteps must be at least 2, got 1"),
    ],
)
def test_bad_values_are_refused(
    key: str, value: str, message: str, recon: Call, teacher: Path, tmp_path: Path
) -> None:
    root = tmp_path / "run"
    status, printed = recon([*arguments(root, teacher), key, value])
    assert status == 2
    assert message in printed.splitlines()[-1]
    assert not root.exists()
