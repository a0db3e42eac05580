"""Methods with several kinds of stages: each is an object of its own while it is open."""

from typing import Any

import torch
from torch import Tensor, nn

from recon.engine.reconstruction import Reconstruction
from recon.engine.unit import OpenUnit, Stage, StageState


class OpenStage:
    """What is done in a stage while it is open; by default nothing."""

    largest_gradient: float | None = None
    """Norm that the gradient of a step is cut to; None: as the trainer says."""

    def state(self) -> dict[str, Tensor]:
        """What the stage keeps, as it starts; checkpoints hold it."""
        return {}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What learns, as `Reconstruction.parameter_groups`; without any it is a search."""
        return []

    def before_step(self, step: int, state: StageState) -> dict[str, float]:
        """Looks at where the stage stands before each step; values to be logged."""
        return {}

    def step(self, step: int, state: StageState) -> dict[str, float]:
        """One step of a search; values to be logged."""
        return {}

    def on_loss(self, loss: Tensor, state: StageState) -> None:
        """Sees the mean loss of each step, before the parameters it belongs to move."""

    def conclude(self, state: StageState) -> dict[str, Any]:
        """Draws the conclusions; what it returns is added to `Reconstruction.findings`."""
        return {}


class StagedReconstruction(Reconstruction):
    """Asks the open stage whatever depends on its kind; losses stay with the method.

    Args:
        **kwargs: Arguments of `Reconstruction`.
    """

    current: OpenStage = OpenStage()
    """The open stage; one that does nothing where there is none."""

    def begun(self, stage: Stage) -> OpenStage:
        """The object for a stage that opens, also for one that is continued."""
        raise NotImplementedError

    def open_stage(self, stage: Stage) -> dict[str, Tensor]:
        """See `Reconstruction.open_stage`."""
        self.current = self.begun(stage)
        return self.current.state()

    def search_step(self, stage: Stage, step: int) -> dict[str, float]:
        """See `Reconstruction.search_step`."""
        assert self.stage_state is not None
        return self.current.step(step, self.stage_state)

    def close_stage(self, stage: Stage) -> None:
        """See `Reconstruction.close_stage`."""
        assert self.stage_state is not None
        self.findings |= self.current.conclude(self.stage_state)
        self.current = OpenStage()

    def parameter_groups(self, unit: OpenUnit) -> list[dict[str, Any]]:
        """See `Reconstruction.parameter_groups`."""
        return self.current.parameter_groups()

    def preparation_groups(self) -> list[dict[str, Any]]:
        """See `Reconstruction.preparation_groups`."""
        return self.current.parameter_groups()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Lightning: before each step."""
        assert self.stage_state is not None
        found = self.current.before_step(batch_idx, self.stage_state)
        self.log_dict({f"recon/{name}": v for name, v in found.items()}, batch_size=1)

    def on_loss(self, loss: Tensor) -> None:
        """See `Reconstruction.on_loss`."""
        assert self.stage_state is not None
        self.current.on_loss(loss, self.stage_state)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Lightning: as the trainer says, and within what the open stage allows."""
        super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
        if self.current.largest_gradient is not None:
            nn.utils.clip_grad_norm_(self._trained, self.current.largest_gradient)
