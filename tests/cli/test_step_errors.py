"""The error of each sampling step, against diffusers' own pipeline and the loaded result."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import recon as package
from recon.callbacks.step_errors import StepErrors
from recon.engine.step_errors import relative_errors
from recon.errors import ConfigError
from tests.cli.command import finished, image_arguments

Call = Callable[[list[str]], tuple[int, str]]


def test_each_step_is_measured_on_what_full_precision_sampling_puts_into_the_network(
    recon: Call, finished_run: Path, pipeline: Path, tmp_path: Path
) -> None:
    root = tmp_path / "run"
    root.mkdir()
    for part in finished_run.iterdir():
        (root / part.name).symlink_to(part)
    status, printed = recon(["validate", "--run", str(root), "--step_errors.prompts", "1"])
    assert status == 0, printed
    assert "Error of one call at each sampling step, prompts: 1" in printed
    found = json.loads((root / "validate_steps.json").read_text())
    restated = errors_of_one(pipeline, root, found["prompts"][0], found["seeds"][0])
    assert [row["timestep"] for row in found["errors"]] == [t for t, _ in restated]
    measured = [row["quantized"] for row in found["errors"]]
    assert measured == pytest.approx([error for _, error in restated], rel=1e-5)
    assert all(row["round_to_nearest"] > row["quantized"] > 0 for row in found["errors"])


def errors_of_one(
    teacher: Path, root: Path, prompt: str, seed: int
) -> list[tuple[float, float]]:  # fmt: skip
    """Timesteps and errors, from nothing of ours but the quantised network."""
    from diffusers import CogVideoXPipeline

    pipe = CogVideoXPipeline.from_pretrained(teacher)
    pipe.set_progress_bar_config(disable=True)
    quantized, network = package.load(root), pipe.transformer
    forward, result = network.forward, []

    def beside(*arguments: Any, **named: Any) -> Any:
        wanted = forward(*arguments, **named)
        error = (quantized(*arguments, **named)[0] - wanted[0]).double().square().sum()
        relative = float(error / wanted[0].double().square().sum())
        result.append((float(named["timestep"][0]), relative))
        return wanted

    network.forward = beside
    pipe(
        prompt,
        num_frames=network.config.sample_frames,
        num_inference_steps=4,
        guidance_scale=3.0,
        max_sequence_length=network.config.max_text_seq_length,
        generator=torch.Generator().manual_seed(seed),
        output_type="latent",
    )
    return result


def test_errors_are_summed_over_samples_before_they_are_divided() -> None:
    def row(power: float, nearest: float, quantized: float) -> dict[str, float]:
        return {
            "timestep": 9.0, "power": power, "round_to_nearest": nearest, "quantized": quantized
        }  # fmt: skip

    found = relative_errors([[row(1.0, 1.0, 0.5)], [row(3.0, 1.0, 0.0)]])
    assert found == [{"timestep": 9.0, "round_to_nearest": 0.5, "quantized": 0.125}]


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_measure_what_one_does(images: Path, tmp_path: Path) -> None:
    root = tmp_path / "run"
    assert finished(image_arguments(root, images), tmp_path / "log") == 0
    measured = []
    for count in ("1", "2"):
        command = ["test", "--run", str(root), "--step_errors.prompts", "3"]
        more = ["--trainer.devices", count, "--trainer.accelerator", "cpu"]
        assert finished([*command, *more], tmp_path / "log") == 0, (tmp_path / "log").read_text()
        measured.append((root / "test_steps.json").read_text())
    assert measured[0] == measured[1]
    assert len(json.loads(measured[0])["errors"]) == 5


def test_what_has_no_steps_is_refused_before_anything_is_sampled() -> None:
    class Questions:  # stands for a trainer, of which nothing else is read
        datamodule = object()

    StepErrors(0).begin(Questions())  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"step_errors\.prompts is 2, but object evaluates"):
        StepErrors(2).begin(Questions())  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="at least 0, got -1"):
        StepErrors(-1)
