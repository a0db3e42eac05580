"""One W&B run and one csv per run folder, with axes that suit units."""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from recon.atomic import whole_file
from recon.engine.reconstruction import Reconstruction

UNIT_METRICS = ("unit/error_before", "unit/error_after", "unit/seconds")


class UnitTracking(Callback):
    """Logs each closed unit's errors and seconds over the unit's index, to every logger."""

    def __init__(self) -> None:
        self._logged = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Lightning: loggers exist, nothing was logged."""
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger) and trainer.is_global_zero and stage == "fit":
                run = logger.experiment
                run.define_metric("unit/index")
                for name in UNIT_METRICS:
                    run.define_metric(name, step_metric="unit/index")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lightning: position and history are restored."""
        assert isinstance(pl_module, Reconstruction)
        self._logged = len(pl_module.history)
        for logger in trainer.loggers:
            if isinstance(logger, RunCSVLogger) and trainer.is_global_zero:
                logger.resume_at(trainer.global_step)
                for index in range(self._logged):
                    logger.log_metrics(*_row(pl_module, index))

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Lightning: a run may go on from here, so what led here must be on disk."""
        for logger in trainer.loggers:
            if isinstance(logger, RunCSVLogger):
                logger.save()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lightning: the unit before is closed."""
        self._log_closed(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lightning: the last unit is closed."""
        self._log_closed(trainer, pl_module)
        for logger in trainer.loggers:
            logger.save()

    def _log_closed(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Reconstruction)
        for index in range(self._logged, len(pl_module.history)):
            for logger in trainer.loggers:
                logger.log_metrics(*_row(pl_module, index))
        self._logged = len(pl_module.history)


def _row(module: Reconstruction, index: int) -> tuple[dict[str, float], int]:
    """Metrics of a closed unit, and the step at which it was closed."""
    row = dict(module.history[index])
    step = int(row.pop("step"))
    return {"unit/index": float(index), **{f"unit/{name}": v for name, v in row.items()}}, step


class RunCSVLogger(Logger):
    """A `metrics.csv` that survives a resumed run.

    Lightning's CSVLogger deletes what an earlier process wrote. This one keeps every step's row
    below the one the run resumes at, and makes room when a metric appears for the first time.

    Args:
        path: The file; its folder is made with the first row.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path
        self._columns: list[str] = []
        self._rows: list[dict[str, Any]] | None = None
        self._new: list[dict[str, Any]] = []

    @property
    def name(self) -> str:
        """Lightning: the experiment."""
        return "recon"

    @property
    def save_dir(self) -> str:
        """Lightning: where the run's files go."""
        return str(self._path.parent)

    @property
    def version(self) -> str:
        """Lightning: one file per run."""
        return ""

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: config.yaml has them."""

    def resume_at(self, step: int) -> None:
        """Keeps earlier rows of steps below `step`, none of units: a kill may have cost some.

        Call before anything is logged.
        """
        rows = _read(self._path)
        kept = [row for row in rows if int(row["step"]) < step and not row.get("unit/index")]
        self._columns = list(rows[0]) if rows else []
        if len(kept) != len(rows):
            self._rewrite(kept)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """One row."""
        self._new.append({"step": step or 0, **{k: float(v) for k, v in metrics.items()}})
        if len(self._new) >= 50:
            self.save()

    @rank_zero_only
    def save(self) -> None:
        """Puts the new rows on disk."""
        if not self._new:
            return
        appeared = dict.fromkeys(k for row in self._new for k in row if k not in self._columns)
        if appeared:
            earlier = _read(self._path)
            self._columns += list(appeared)
            self._rewrite([*earlier, *self._new])
        else:
            with self._path.open("a", newline="") as file:
                csv.DictWriter(file, self._columns, restval="").writerows(self._new)
        self._new = []

    def finalize(self, status: str) -> None:
        """Lightning: the run ends, well or not."""
        self.save()

    def _rewrite(self, rows: list[dict[str, Any]]) -> None:
        with whole_file(self._path) as aside, aside.open("w", newline="") as file:
            writer = csv.DictWriter(file, self._columns, restval="")
            writer.writeheader()
            writer.writerows(rows)


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        # A line cut short by a kill has no step or fewer fields: it is made again.
        return [row for row in csv.DictReader(file) if row.get("step") and None not in row.values()]
