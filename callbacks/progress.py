"""What the terminal shows while units are reconstructed."""

import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from recon.engine.reconstruction import Reconstruction


class UnitProgress(ProgressBar):
    """One bar per run: unit i of n, step, loss, error before → after of the last unit, time left.

    On a terminal it redraws in place; elsewhere it writes one line per closed unit.

    Args:
        refresh_rate: Steps between two redraws.
    """

    def __init__(self, refresh_rate: int = 10) -> None:
        super().__init__()
        self._refresh_rate = refresh_rate
        self._console = Console(stderr=True)
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._enabled = True
        self._reported = 0
        self._started = time.monotonic()
        self._first_step = 0

    def disable(self) -> None:
        """Lightning: this process is not the one that shows."""
        self._enabled = False

    def enable(self) -> None:
        """Lightning: this process is the one that shows."""
        self._enabled = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lightning: streams are ready, the first unit is open."""
        self._started, self._first_step = time.monotonic(), trainer.global_step
        assert isinstance(pl_module, Reconstruction)
        self._reported = len(pl_module.history)
        if not self._enabled or not self._console.is_terminal:
            return
        self._progress = Progress(
            TextColumn("unit {task.fields[unit]}"),
            BarColumn(bar_width=24),
            TextColumn("step {task.fields[step]}  loss {task.fields[loss]}"),
            TextColumn("{task.fields[error]}"),
            TextColumn("{task.fields[left]} left"),
            console=self._console,
        )
        total = pl_module.planned_steps
        self._task = self._progress.add_task("", total=total, **self._fields(trainer, pl_module))
        self._progress.start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        """Lightning: a step is done."""
        if self._progress is None or self._task is None:
            return
        if trainer.global_step % self._refresh_rate:
            return
        assert isinstance(pl_module, Reconstruction)
        done = trainer.global_step
        total = pl_module.planned_steps  # more is known once the network is cut into units
        self._progress.update(
            self._task, completed=done, total=total, **self._fields(trainer, pl_module)
        )

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lightning: the unit before is closed."""
        self._report(pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lightning: no unit is left."""
        self._report(pl_module)
        self._stop()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Lightning: the terminal must be given back."""
        self._stop()

    def _stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _report(self, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Reconstruction)
        for index in range(self._reported, len(pl_module.history)):
            row = pl_module.history[index]
            if self._enabled:
                self._console.print(
                    f"unit {index + 1}/{len(pl_module.units)} {pl_module.units[index].name}  "
                    f"error {_change(row)}  {row['seconds']:.1f} s",
                    highlight=False,
                )
        self._reported = len(pl_module.history)

    def _fields(self, trainer: Trainer, module: Reconstruction) -> dict[str, Any]:
        stage, total = module.stage, module.planned_steps
        done = trainer.global_step - self._first_step
        pace = (time.monotonic() - self._started) / done if done else 0.0
        left = pace * (total - trainer.global_step)
        loss = trainer.callback_metrics.get("recon/loss")
        return {
            "unit": f"{module.index + 1}/{len(module.units)}" if module.units else "–",
            "step": f"{module.finished_steps}/{stage.steps} of {stage.name}",
            "loss": "–" if loss is None else f"{float(loss):.2e}",
            "error": f"error {_change(module.history[-1])}" if module.history else "",
            "left": f"{int(left // 60)}:{int(left % 60):02d}" if done else "–",
        }


def _change(row: dict[str, float]) -> str:
    return f"{row['error_before']:.2e} → {row['error_after']:.2e}"
