"""Image transformers from the command line, on a tiny random DiT of DiT-XL's layout."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from recon.callbacks.samples import write_picture
from recon.models.image_pipeline import ImagePipeline
from tests.cli.command import CONFIGS, codes, finished
from tests.models.tiny import write_tiny_dit

Call = Callable[[list[str]], tuple[int, str]]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    return write_tiny_dit(folder, layers=2, classes=6, pipeline=True)


def arguments(root: Path, teacher: Path, *more: str, config: str = "ptq4dit") -> list[str]:
    return [
        *("fit", "--config", str(CONFIGS / f"{config}.yaml"), *more),
        *("--trainer.default_root_dir", str(root), "--trainer.accelerator", "cpu"),
        *("--wandb", "false", "--media.after_fit", "2", "--media.count", "2"),
        *("--model.adapter.init_args.folder", str(teacher), "--model.steps", "5"),
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
    assert len(list((root / "samples").glob("test_*_*.png"))) == 2
    assert (root / "samples" / "test_classes.png").is_file()
    assert result["settings"]["distribution"].startswith("not computed: metrics.distribution.ref")
    status, printed = recon(["predict", "--run", str(root)])
    assert status == 0, printed
    assert len(list((root / "predictions").glob("*.png"))) == 4


@pytest.mark.slow
def test_evaluation_samples_and_compares_as_configured(
    recon: Call, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "run"
    quick = ("--model.balance", "none", "--model.reconstruct", "false", "--media.after_fit", "0")
    status, printed = recon([*arguments(root, teacher), *quick])
    assert status == 0, printed
    for index in range(9):
        picture = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(index))
        write_picture(tmp_path / "reference" / f"{index}.png", picture)
    extractor = "tests.callbacks.colours.Colours"
    generate, seen = ImagePipeline.generate, list[tuple[str, int, int]]()

    def recorded(
        pipeline: ImagePipeline, labels: list[str], seeds: list[int], steps: int, guidance: float
    ) -> Tensor:
        rows: list[int] = []
        visit = lambda step, sample: rows.append(len(sample["class_labels"]))  # noqa: E731
        images = generate(pipeline, labels, seeds, steps, guidance, visit=visit)
        seen.append((pipeline.sampler, len(rows) // len(labels), rows[0]))
        return images

    monkeypatch.setattr(ImagePipeline, "generate", recorded)
    means = set()
    for sampler, steps, guidance in (("ddim", 50, 4.0), ("ddpm", 100, 4.0), ("ddpm", 250, 1.0)):
        seen.clear()
        branches = "both" if guidance > 1 else "conditional"
        status, printed = recon(
            [
                *("test", "--run", str(root), "--data.steps", str(steps)),
                *("--data.guidance", str(guidance), "--data.branches", branches),
                *("--model.init_args.adapter.init_args.sampler", sampler),
                *("--data.num_test_images", "2", "--metrics.distribution.extractor", extractor),
                *("--metrics.distribution.reference", str(tmp_path / "reference")),
                *("--metrics.distribution.kid_subset_size", "2"),
            ]
        )
        assert status == 0, printed
        # A row of the class and, with guidance, one of the null class; for each of three forms.
        assert seen == [(sampler, steps, 2 if guidance > 1 else 1)] * 3
        result = json.loads((root / "test.json").read_text())
        settings = result["settings"]
        assert [settings[k] for k in ("sampler", "steps", "guidance")] == [sampler, steps, guidance]
        assert settings["distribution"]["extractor"] == extractor
        assert set(settings["distribution"]["left_out"]) == {"fid", "precision", "recall"}
        means.add(result["full_precision"]["kid"])
    assert len(means) == 3  # other samples each time
    status, printed = recon(["compare", str(root)])
    assert f"{result['quantized']['kid']:.4f}" in printed


@pytest.mark.distributed
@pytest.mark.parametrize("config", ["ptq4dit", "ptq4dit_faithful"])
def test_two_processes_leave_the_bytes_of_one(config: str, teacher: Path, tmp_path: Path) -> None:
    written = []
    for count in ("1", "2"):
        root = tmp_path / count / "run"
        fit = [*arguments(root, teacher, config=config), "--media.after_fit", "0"]
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
        ("--metrics.distribution.drawn", "0", "drawn must be at least 2, got 0"),
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
