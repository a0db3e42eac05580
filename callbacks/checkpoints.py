"""Checkpoints at the two kinds of place from which a run resumes bit for bit."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from recon.engine.reconstruction import Reconstruction

FOLDER = "checkpoints"


class UnitCheckpoint(ModelCheckpoint):
    """After each stage was closed and the next one opened: `checkpoints/unit=007.ckpt`.

    The number is that of the closed units.

    Args:
        keep: How many to keep: 1 the newest, -1 all.
    """

    def __init__(self, keep: int = 1) -> None:
        super().__init__(
            monitor="first_step" if keep > 0 else None,
            mode="max",
            filename="unit={unit_index:03.0f}",
            auto_insert_metric_name=False,
            save_top_k=keep,
            every_n_epochs=1,
            save_on_train_epoch_end=True,
        )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Lightning: the run folder is known."""
        self.dirpath = str(Path(trainer.default_root_dir) / FOLDER)
        super().setup(trainer, pl_module, stage)

    def _monitor_candidates(self, trainer: Trainer) -> dict[str, torch.Tensor]:
        candidates = super()._monitor_candidates(trainer)
        module = trainer.lightning_module
        assert isinstance(module, Reconstruction)
        place = {"unit_index": module.index, "first_step": module.first_step}
        return {**candidates, **{name: torch.tensor(float(value)) for name, value in place.items()}}


class StepCheckpoint(ModelCheckpoint):
    """Inside a unit, every so many steps and when the run is stopped: `checkpoints/step.ckpt`.

    Never after a unit's last step: Lightning would take the unit for finished without closing it,
    and train it a second time.

    Args:
        every_n_steps: Optimizer steps between two files.
    """

    def __init__(self, every_n_steps: int = 200) -> None:
        super().__init__(
            filename="step",
            save_top_k=1,
            every_n_train_steps=every_n_steps,
            save_on_train_epoch_end=False,
            enable_version_counter=False,
            save_on_exception=True,
        )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Lightning: the run folder is known."""
        self.dirpath = str(Path(trainer.default_root_dir) / FOLDER)
        super().setup(trainer, pl_module, stage)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        """Lightning: a step is done."""
        if not trainer.is_last_batch:
            super().on_train_batch_end(trainer, pl_module, *args, **kwargs)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Lightning: the run is being stopped, by a fault, SIGTERM or Ctrl-C."""
        assert isinstance(pl_module, Reconstruction)
        inside = pl_module.stage_state is not None and (
            0 < pl_module.finished_steps < pl_module.stage.steps
        )
        if inside and not trainer.is_last_batch:
            super().on_exception(trainer, pl_module, exception)
