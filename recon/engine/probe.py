"""A few steps of one unit on random inputs, timed: what a fit will take.

The probe is an ordinary fit of one process, on the configured device, threads and compilation,
whose calibration set is a batch of random samples; it is stopped after a few steps.
"""

import copy
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from recon.calibration.artefact import CalibrationSet, Samples
from recon.engine import walk
from recon.engine.data import CalibrationData
from recon.models.adapter import ModelAdapter
from recon.types import Sample

if TYPE_CHECKING:
    from recon.engine.reconstruction import Reconstruction

STEPS = 4
"""Timed steps, behind a first one that compiles and allocates."""


@dataclass(frozen=True)
class Pace:
    """Seconds of one process, for one unit."""

    opening: float
    """What opening takes beside the teacher's forwards."""
    teacher: float
    """One sample through the full-precision unit."""
    student: float
    """One sample through the quantised unit."""
    first_step: float
    """With compilation, where there is any."""
    step: float
    """A later step, of the whole batch."""
    closing: float
    """Folding and rounding."""


def pace(module: "Reconstruction", data: CalibrationData, device: torch.device) -> Pace:
    """How long the parts of a unit take.

    Args:
        module: The method, cut into units, with its number of samples; it is not changed.
        data: Says how many rows a sample has.
        device: Where units run.

    Raises:
        ReconError: As a fit.
    """
    probed = _probed(module, data.sample_counts[2], device)
    samples = _samples(probed.adapter, module.batch_size + 1, data.sample_counts[2], device)
    stopwatch = _Stopwatch(module.batch_size + 1)
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as root:
        trainer = Trainer(
            default_root_dir=root,
            accelerator="cpu" if device.type == "cpu" else "gpu",
            devices=1,
            max_epochs=-1,
            reload_dataloaders_every_n_epochs=1,
            use_distributed_sampler=False,
            limit_val_batches=0,
            num_sanity_val_steps=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[stopwatch],
        )
        try:
            trainer.fit(probed, _RandomData(samples, data.sample_counts[2], Path(root)))
        except _EnoughError:
            pass
        finally:
            torch.set_num_threads(threads)
    assert stopwatch.pace is not None
    return stopwatch.pace


def _probed(module: "Reconstruction", rows: int, device: torch.device) -> "Reconstruction":
    """A copy with the same unit first, whose one stage is the last of it, where something learns.

    A search before it would be run over all samples; nothing of it is needed to time a step.
    """
    units, stages = module.foreseen_units(), module.unit_stages
    compiled = module.compile_choice
    if compiled == "auto":
        adapter = module.adapter
        state = adapter.example_state(rows, "meta", adapter.compute_dtype(device))
        compiled = walk.compiling_pays(module, state, device)
    probed = copy.deepcopy(module)
    probed.units, probed.compile_choice = [], compiled
    # On the object, before the class's own: a copy of any method is probed.
    vars(probed).update(
        partition=lambda: units,
        preparation=lambda: [],
        unit_stages=lambda unit: stages(unit)[-1:],
    )
    return probed


def _samples(adapter: ModelAdapter, count: int, rows: int, device: torch.device) -> list[Sample]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = [
            adapter.example_sample(rows, "cpu", adapter.compute_dtype(device)) for _ in range(count)
        ]
    for number, sample in enumerate(made):
        if "timestep" in sample:  # methods treat timesteps apart
            sample["timestep"] = sample["timestep"] - number
    return made


class _RandomData(CalibrationData):
    """Hands out random samples, the last of them held out."""

    def __init__(self, samples: list[Sample], rows: int, folder: Path) -> None:
        super().__init__()
        self._rows = rows
        chosen, held_out = cast(Samples, samples[:-1]), cast(Samples, samples[-1:])
        self._set = CalibrationSet(folder, chosen, held_out, {"fingerprint": {}})

    def check(self, adapter: ModelAdapter) -> None:
        """Made for the adapter."""

    @property
    def sample_counts(self) -> tuple[int, int, int]:
        """See `CalibrationData.sample_counts`."""
        return len(self._set.samples), len(self._set.held_out), self._rows

    @property
    def calibration_set(self) -> CalibrationSet:
        """The random samples."""
        return self._set


class _EnoughError(Exception):
    """Ends the probe; private, so that it hides no real error."""


class _Stopwatch(Callback):
    """Times the parts of the first unit, then stops the fit.

    Args:
        samples: How many the teacher has passed when the unit is open.
    """

    def __init__(self, samples: int) -> None:
        self.pace: Pace | None = None
        self._samples = samples
        self._opening = 0.0
        self._ends: list[float] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lightning: the first unit is open."""
        opened = cast("Reconstruction", pl_module).opened
        assert opened is not None
        self._opening = time.monotonic() - opened.started
        self._ends = [time.monotonic()]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        """Lightning: a step is done."""
        self._ends.append(_now(pl_module.device))
        if len(self._ends) > STEPS + 1 or trainer.is_last_batch:
            self.pace = self._conclude(cast("Reconstruction", pl_module))
            raise _EnoughError

    def _conclude(self, module: "Reconstruction") -> Pace:
        opened, frontier = module.opened, module.frontier
        assert opened is not None
        steps = [end - start for start, end in zip(self._ends, self._ends[1:], strict=False)]
        with torch.no_grad():
            state = frontier.state("teacher", 0)
            teacher = _timed(lambda: frontier.run(opened.teacher_blocks, state), module.device)
            closing = _timed(lambda: module.close_unit(opened), module.device)
            student = _timed(lambda: frontier.run(opened.student_blocks, state), module.device)
        return Pace(
            opening=max(self._opening - self._samples * teacher, 0.0),
            teacher=teacher,
            student=student,
            first_step=steps[0],
            step=sorted(steps[1:] or steps)[len(steps[1:] or steps) // 2],
            closing=closing,
        )


def _timed(run: Callable[[], Any], device: torch.device) -> float:
    started = _now(device)
    run()
    return _now(device) - started


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.monotonic()
