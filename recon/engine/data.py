"""What the engine needs of a DataModule."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningDataModule

from recon.calibration.artefact import CalibrationSet
from recon.models.adapter import ModelAdapter


@dataclass(frozen=True)
class Sampling:
    """What making a calibration set takes, for planning."""

    calls: int = 0
    """Calls of the whole network, over all processes."""
    rows: int = 1
    """Batch size of each."""
    spilled: int = 0
    """Samples on disk at a time, before the set is chosen from them."""
    scored: int = 0
    """Candidates whose scores are kept with the set."""


class CalibrationData(LightningDataModule):
    """A DataModule whose product is a calibration set; the base that YAML's `data` names.

    `setup("fit")` makes or finds the set. Evaluation loaders are the subclass's own.
    """

    steps: int
    """Sampling steps of evaluation."""
    guidance: float
    """Guidance scale of evaluation."""
    baselines: str | None = None
    """Folder that keeps what the teacher and round-to-nearest make in an evaluation, for other runs
    to compare with; None: made anew in every evaluation."""
    seconds: float = 0.0
    """What calibration took in this process."""

    def setup(self, stage: str) -> None:
        """Lightning: the first hook of a run that knows the module; subclasses begin with it."""
        assert self.trainer is not None
        threads: int | None = self.trainer.lightning_module.threads  # type: ignore[assignment]
        if threads is not None:
            # Calibration's sums are split by threads too, so this cannot wait for the module.
            torch.set_num_threads(threads)

    @abstractmethod
    def check(self, adapter: ModelAdapter) -> None:
        """Refuses, before anything heavy, what cannot work."""

    @property
    @abstractmethod
    def sample_counts(self) -> tuple[int, int, int]:
        """Calibration samples, held-out samples, and the batch size of each, before any is made."""

    @property
    def sampling(self) -> Sampling:
        """What making the set takes; default: nothing."""
        return Sampling()

    def sample_bytes(self, adapter: ModelAdapter, dtype: torch.dtype) -> int:
        """Bytes of one sample's tensors; default: those of the configured input size."""
        sample = adapter.example_sample(self.sample_counts[2], "meta", dtype)
        return sum(tensor.nbytes for tensor in sample.values())

    @property
    @abstractmethod
    def calibration_set(self) -> CalibrationSet:
        """The set that `setup("fit")` found or made."""

    def outputs(self, pipeline: Any, batch: Mapping[str, Any]) -> Any:
        """What an evaluation looks at: what a pipeline makes of a batch of this module's loaders.

        Default: samples of the batch's prompts and seeds, a float tensor [prompts, frames, 3,
        height, width] (or without frames) in [0, 1] on the CPU.
        """
        return pipeline.generate(
            list(batch["prompt"]), list(batch["seed"]), steps=self.steps, guidance=self.guidance
        )

    def sampling_settings(self) -> dict[str, Any]:
        """What `outputs` depends on beside the pipeline and the batch."""
        return {"steps": self.steps, "guidance": self.guidance}

    def train_dataloader(self) -> Any:
        """The engine's: batches are indices into the set, dealt unit by unit."""
        assert self.trainer is not None
        return self.trainer.lightning_module.train_dataloader()
