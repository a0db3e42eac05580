"""Validation and test are one thing to a callback that looks at samples."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class Evaluating(Callback):
    """Sends Lightning's hooks of both evaluations to three of its own; `verb` names the file."""

    def begin(self, trainer: Trainer) -> None:
        """An evaluation starts: forget an earlier one."""

    def look(self, trainer: Trainer, outputs: Any, verb: str) -> None:
        """One step returned `outputs`."""

    def finish(self, trainer: Trainer, module: LightningModule, verb: str) -> None:
        """All steps are done."""

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lightning: validation starts."""
        self.begin(trainer)

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lightning: the test starts."""
        self.begin(trainer)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Lightning: a validation step is done."""
        self.look(trainer, outputs, "validate")

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Lightning: a test step is done."""
        self.look(trainer, outputs, "test")

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lightning: validation ends."""
        self.finish(trainer, pl_module, "validate")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lightning: the test ends."""
        self.finish(trainer, pl_module, "test")
