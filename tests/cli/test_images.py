"""Image transformers from the command line, on a tiny random DiT of DiT-XL's layout."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from recon.callbacks.samples import write_picture
from recon.models.image_pipeline import ImagePipeline
from tests.cli.command import CONFIGS, codes, finished, image_arguments

Call = Callable[[list[str]], tuple[int, str]]


@pytest.mark.parametrize("config", ["ptq4dit", "ptq4dit_faithful"])
def test_fit_test_and_predict_on_images(
    config: str, recon: Call, images: Path, tmp_path: Path
) -> None:
    root = tmp_path / "run"
    status, printed = recon(image_arguments(root, images, config=config))
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


@pytest.mark.parametrize(
    ("config", "steps"), [("rtn", None), ("smoothquant", None), ("gptq", None), ("adaround", 5)]
)
def test_the_baselines_run_on_images(
    config: str, steps: int | None, recon: Call, images: Path, tmp_path: Path
) -> None:
    root = tmp_path / "run"
    overlay = ("--config", str(CONFIGS / "models" / "image_teacher.yaml"))
    status, printed = recon(image_arguments(root, images, *overlay, config=config, steps=steps))
    assert status == 0, printed
    summary = json.loads((root / "summary.json").read_text())
    assert summary["bits"] == {"weight": 4, "activation": 8}
    assert 0 < summary["error"]["reconstructed"] < 1
    assert len(list((root / "samples").glob("fit_*.png"))) == 2


def test_runs_that_share_baselines_sample_them_once(
    recon: Call, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate, batches = ImagePipeline.generate, list[int]()

    def counted(pipeline: ImagePipeline, labels: list[str], *given: Any, **named: Any) -> Tensor:
        batches.append(len(labels))
        return generate(pipeline, labels, *given, **named)

    monkeypatch.setattr(ImagePipeline, "generate", counted)
    kept, teacher = tmp_path / "baselines", tmp_path / "teacher"
    shutil.copytree(images, teacher)
    overlay = ("--config", str(CONFIGS / "models" / "image_teacher.yaml"))

    def tested(root: Path, bits: int, *changed: str) -> tuple[dict[str, Any], int]:
        if not root.exists():
            made = image_arguments(root, teacher, *overlay, config="rtn", steps=None)
            settings = ("--media.after_fit", "0", "--data.test_batch_size", "4")
            status, printed = recon([*made, *settings, "--model.activation.num_bits", str(bits)])
            assert status == 0, printed
        batches.clear()
        status, printed = recon(["test", "--run", str(root), *changed])
        assert status == 0, printed
        return json.loads((root / "test.json").read_text()), len(batches)

    share = ("--data.baselines", str(kept))
    first, eight, six = tmp_path / "first", tmp_path / "eight", tmp_path / "six"
    alone, calls = tested(first, 8)
    assert calls == 3
    assert not kept.exists()
    shared, calls = tested(first, 8, *share)
    assert calls == 3
    assert len(list(kept.iterdir())) == 2
    assert shared["samples"] == alone["samples"]
    again, calls = tested(eight, 8, *share)
    assert calls == 1
    assert again["samples"] == alone["samples"]
    assert tested(six, 6, *share)[1] == 2  # another round-to-nearest
    assert tested(six, 6, *share, "--data.guidance", "3")[1] == 3
    for file in kept.iterdir():
        file.write_bytes(file.read_bytes()[:-1])
    mended, calls = tested(first, 8, *share)
    assert calls == 3
    assert mended["samples"] == alone["samples"]
    assert tested(first, 8, *share)[1] == 1
    vae = next((teacher / "vae").glob("*.safetensors"))
    vae.write_bytes(vae.read_bytes()[:-1] + b"\0")
    assert tested(first, 8, *share)[1] == 3


@pytest.mark.slow
def test_evaluation_samples_and_compares_as_configured(
    recon: Call, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "run"
    quick = ("--model.balance", "none", "--model.reconstruct", "false", "--media.after_fit", "0")
    status, printed = recon([*image_arguments(root, images), *quick])
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
        made = generate(pipeline, labels, seeds, steps, guidance, visit=visit)
        seen.append((pipeline.sampler, len(rows) // len(labels), rows[0]))
        return made

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
@pytest.mark.parametrize("attention", ["false", "true"])
@pytest.mark.parametrize("config", ["ptq4dit", "ptq4dit_faithful"])
def test_two_processes_leave_the_bytes_of_one(
    config: str, attention: str, images: Path, tmp_path: Path
) -> None:
    written = []
    for count in ("1", "2"):
        root = tmp_path / count / "run"
        more = ("--model.quantize_attention", attention, "--media.after_fit", "0")
        fit = [*image_arguments(root, images, config=config), *more]
        assert finished([*fit, "--trainer.devices", count], root.parent / "log") == 0
        written.append(codes(root))
    assert written[0] == written[1]


def test_the_configuration_of_the_real_model_needs_its_folder_and_takes_one_of_its_layout(
    recon: Call, images: Path, tmp_path: Path
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
    status, printed = recon(image_arguments(root, images, "--config", real, "--config", str(own)))
    assert status == 0, printed
    assert (root / "quantized" / "manifest.json").is_file()


def test_the_real_model_is_fitted_for_diffusers_with_the_key_its_configuration_names(
    recon: Call, images: Path, tmp_path: Path
) -> None:
    real = CONFIGS / "models" / "dit_xl_2_256.yaml"
    key = "--model.init_args.adapter.init_args.downscale_freq_shift"
    assert f"#   {key} 1\n" in real.read_text()
    own = tmp_path / "own.yaml"
    own.write_text("model: {init_args: {adapter: {init_args: {vae: null}}}}")
    root = tmp_path / "run"
    fit = image_arguments(root, images, "--config", str(real), "--config", str(own), key, "1")
    status, printed = recon(fit)
    assert status == 0, printed
    status, printed = recon(["export", "--run", str(root), "--format", "bf16"])
    assert status == 0, printed
