"""A calibration set that is made once and kept on disk."""

import gc
import time
from abc import abstractmethod
from pathlib import Path
from typing import Literal, cast

import torch

from recon.calibration import ranks
from recon.calibration.artefact import CalibrationSet, Fingerprint
from recon.engine.data import CalibrationData
from recon.errors import CalibrationError
from recon.models.adapter import ModelAdapter


class KeptCalibration(CalibrationData):
    """Finds the set of its fingerprint in the run folder, or has it built there.

    Subclasses say what a set depends on and how it is built.
    """

    folder: str | None
    """Where the set is kept; None: `calibration` in the run folder."""
    stale: Literal["refuse", "rebuild"]
    """What to do with a set of another configuration or teacher, or a damaged one."""

    def __init__(self) -> None:
        super().__init__()
        self._set: CalibrationSet | None = None

    @abstractmethod
    def fingerprint_of(self, adapter: ModelAdapter, device: torch.device) -> Fingerprint:
        """All that a set depends on."""

    @abstractmethod
    def build_set(
        self, folder: Path, adapter: ModelAdapter, fingerprint: Fingerprint, device: torch.device
    ) -> None:
        """Makes the set in `folder`. All ranks call this with equal arguments."""

    @property
    def calibration_set(self) -> CalibrationSet:
        """The set that `setup("fit")` found or made.

        Raises:
            CalibrationError: `setup("fit")` has not run.
        """
        if self._set is None:
            raise CalibrationError(
                "The calibration set is not there before setup('fit'). Call setup first, or open "
                "a finished one with CalibrationSet.load(<run folder>/calibration)."
            )
        return self._set

    def setup(self, stage: str) -> None:
        """Find or make the calibration set in the run folder; nothing to do outside fit."""
        super().setup(stage)
        assert self.trainer is not None
        if stage == "fit" and self._set is None:
            adapter = cast(ModelAdapter, self.trainer.lightning_module.adapter)
            root = Path(self.trainer.default_root_dir)
            started = time.monotonic()
            self._set = self.calibrate(adapter, root, self.trainer.strategy.root_device)
            self.seconds = time.monotonic() - started

    def calibrate(self, adapter: ModelAdapter, root: Path, device: torch.device) -> CalibrationSet:
        """The set in `folder`, or `<root>/calibration`, made if not there. All ranks call this.

        Raises:
            ConfigError: As `check` and `build_set`.
            CalibrationError: A set of another configuration or teacher is there, or a damaged
                one, and `stale` is refuse.
            NumericsError: As `build_set`.
        """
        self.check(adapter)
        folder = root / "calibration" if self.folder is None else Path(self.folder)
        # Asked together: rank 0 must not finish a set before another has looked for it.
        present = ranks.anywhere(folder.exists(), device)
        fingerprint = self.fingerprint_of(adapter, device)
        if present:
            found = self._found(folder, fingerprint)
            if not ranks.anywhere(isinstance(found, CalibrationError), device):
                return cast(CalibrationSet, found)
            if self.stale == "refuse":
                if isinstance(found, CalibrationError):
                    raise found
                raise CalibrationError(
                    f"Another process cannot read the calibration set in {folder}; its message "
                    "says why. Delete the folder to have it made again."
                )
        adapter.check()
        self.build_set(folder, adapter, fingerprint, device)
        # A pipeline holds itself in a cycle: its weights would stay for some time.
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()  # what is free is asked for next
        return CalibrationSet.load(folder, fingerprint)

    @staticmethod
    def _found(folder: Path, fingerprint: Fingerprint) -> CalibrationSet | CalibrationError:
        try:
            return CalibrationSet.load(folder, fingerprint)
        except CalibrationError as error:
            return error
