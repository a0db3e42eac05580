"""Whole fits on a tiny random network: a ready calibration set, a trainer, a recorder."""

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from recon.calibration.artefact import CalibrationSet, Row, write_set
from recon.callbacks.checkpoints import StepCheckpoint, UnitCheckpoint
from recon.callbacks.summary import RunSummary
from recon.engine import ReconStrategy, Reconstruction
from recon.engine.checkpoint_io import AtomicCheckpointIO
from recon.engine.data import CalibrationData
from recon.models.adapter import ModelAdapter
from recon.models.cogvideox import CogVideoX
from recon.types import Sample
from tests.models.tiny import tiny_sample

SAMPLES, HELD_OUT = 4, 2


def write_samples(
    folder: Path,
    teacher: Path,
    samples: int = SAMPLES,
    held_out: int = HELD_OUT,
    seed: int = 0,
    *,
    family: type[ModelAdapter] = CogVideoX,
    draw: Callable[..., Sample] = tiny_sample,
) -> Path:
    """A calibration set of random samples, in the shape of the teacher's configuration."""
    config = family(str(teacher)).empty_network().config

    def rows() -> Iterator[Row]:
        for index in range(samples + held_out):
            yield Row(
                draw(config, seed=1000 * seed + index, timestep=100 + 90 * index),
                prompt=f"prompt {index}",
                step=index,
                seed=index,
                change=1.0,
                gram=1.0,
                score=1.0 if index < samples else None,
                split="calibration" if index < samples else "held_out",
                reason="Random.",
            )

    write_set(folder, rows, {"seed": seed, "samples": samples}, {})
    return folder


class FixedData(CalibrationData):
    """Hands out a calibration set that is there already; samples nothing."""

    steps, guidance = 2, 1.0

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.calibration_set_ = CalibrationSet.load(folder)

    def check(self, adapter: ModelAdapter) -> None:
        """Every adapter will do."""

    @property
    def sample_counts(self) -> tuple[int, int, int]:
        return len(self.calibration_set.samples), len(self.calibration_set.held_out), 1

    @property
    def calibration_set(self) -> CalibrationSet:
        return self.calibration_set_


class Interruption(Exception):
    """What stops a run in a test."""


class Soft(Callback):
    """Remembers every registered tensor after each optimizer step: soft values, not only codes."""

    def __init__(self) -> None:
        self.after: dict[int, dict[str, Tensor]] = {}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        state = pl_module.state_dict()
        self.after[trainer.global_step] = {k: v.detach().clone() for k, v in state.items()}


def trainer_for(root: Path, *callbacks: Callback, every: int = 2, **changed: Any) -> Trainer:
    """A trainer with what the command line adds, and nothing that talks."""
    settings: dict[str, Any] = {
        "default_root_dir": root,
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": -1,
        "reload_dataloaders_every_n_epochs": 1,
        "use_distributed_sampler": False,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 0,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "plugins": [AtomicCheckpointIO()],
        **changed,
    }
    own = [UnitCheckpoint(), StepCheckpoint(every), RunSummary()]
    return Trainer(callbacks=[*callbacks, *own], **settings)


def fit(
    root: Path, module: Reconstruction, data: Path, *callbacks: Callback, **settings: Any
) -> Trainer:
    """One fit in `root`; `ckpt_path`, `every` and trainer settings by name."""
    checkpoint = settings.pop("ckpt_path", None)
    trainer = trainer_for(root, *callbacks, **settings)
    trainer.fit(module, FixedData(str(data)), ckpt_path=checkpoint)
    return trainer


def quantized_bytes(root: Path) -> bytes:
    """The file with codes, step sizes, transforms and clips."""
    return (root / "quantized" / "quantized.safetensors").read_bytes()


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """Every tensor bit for bit."""
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


@cache
def gloo() -> ReconStrategy:
    """Our strategy, never started."""
    return ReconStrategy()
