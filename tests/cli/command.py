"""The command line as a user types it, on a tiny pipeline."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
CONFIGS = REPOSITORY / "configs"


def fit_arguments(root: Path, teacher: Path, *more: str, config: str = "s2q_vdit") -> list[str]:
    """`recon fit` of a few seconds in `root`; later arguments win."""
    return [
        "fit",
        *("--config", str(CONFIGS / f"{config}.yaml")),
        *("--trainer.default_root_dir", str(root)),
        *("--trainer.accelerator", "cpu"),
        *("--wandb", "false"),
        *("--media.after_fit", "0"),
        *("--model.threads", "1"),
        *("--model.adapter.folder", str(teacher)),
        *("--data.num_prompts", "2"),
        *("--data.held_out_prompts", "1"),
        *("--data.held_out_samples", "2"),
        *("--data.steps", "4"),
        *("--data.sds.top_k", "4"),
        *("--data.num_test_prompts", "2"),
        *more,
    ]


def image_arguments(
    root: Path, teacher: Path, *more: str, config: str = "ptq4dit", steps: int | None = 5
) -> list[str]:
    """The same on images; `more` may hold further configurations, and `steps` are a unit's."""
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


def contents(root: Path) -> dict[Path, tuple[int, int]]:
    """Size and time of every file, to see that nothing was written."""
    files = (path for path in root.rglob("*") if path.is_file())
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in files}


def process(arguments: list[str], log: Path) -> subprocess.Popen[bytes]:
    """`python -m recon` in a process group of its own, in a folder of its own."""
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
    with log.open("ab") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "recon", *arguments],
            cwd=log.parent, env=environment, stdout=file, stderr=file, start_new_session=True,
        )  # fmt: skip


def finished(arguments: list[str], log: Path, timeout: float = 240) -> int:
    """The exit status of `process`."""
    return process(arguments, log).wait(timeout)


def with_calibration(root: Path, source: Path) -> Path:
    """A run folder in which the calibration set of another is there already."""
    shutil.copytree(source / "calibration", root / "calibration")
    return root


def result(root: Path) -> dict[str, bytes]:
    """The files that must not differ."""
    folder = root / "quantized"
    return {name: (folder / name).read_bytes() for name in sorted(os.listdir(folder))}


def codes(root: Path) -> bytes:
    """The quantised tensors alone: the manifest also holds seconds."""
    return result(root)["quantized.safetensors"]
