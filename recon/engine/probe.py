"""A few steps of one unit on random inputs, timed: what a fit will take.

The probe is an ordinary fit of one process, on the configured device and threads, whose calibration
set is a batch of random samples, or fewer where the device is slow; it is stopped after a few
steps. Nothing is compiled, which alone takes a minute, and opening looks at a few rows of each
weight.
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
from recon.engine.thin_opening import ThinOpening
from recon.errors import BudgetError
from recon.models.adapter import ModelAdapter
from recon.types import Sample

if TYPE_CHECKING:
    from recon.engine.reconstruction import Reconstruction

STEPS = 4
"""Timed steps, behind a first one that allocates."""
SECONDS = 3.0
"""After so many of stepping the step that is under way is the last, but for a first one."""
OPERATIONS = {"cpu": 2e11}
"""Of the linears in one step that is timed: seconds on two cores."""
ACCELERATED = 1e14
"""The same on every other device."""
FORWARDS = 3
"""Forwards of which forward and backward take the time."""
MOST = 3
"""Times that a single sample may exceed this."""


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
    """With what it allocates."""
    step: float
    """A later step, scaled to the whole batch; not compiled."""
    compiled: bool
    """Whether the fit compiles its steps."""
    closing: float
    """Folding and rounding."""


def pace(module: "Reconstruction", data: CalibrationData, device: torch.device) -> Pace:
    """How long the parts of a unit take.

    Args:
        module: The method, cut into units, with its number of samples; it is not changed.
        data: Says how many rows a sample has.
        device: Where units run.

    Raises:
        BudgetError: A single sample is more than the device does in seconds.
        ReconError: As a fit.
    """
    rows = data.sample_counts[2]
    probed, opening = _probed(module, rows, device)
    samples = _samples(probed.adapter, probed.batch_size + 1, rows, device)
    compiled = _compiles(module, rows, device)
    stopwatch = _Stopwatch(opening, (module.batch_size, module.micro_batch), compiled=compiled)
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
            trainer.fit(probed, _RandomData(samples, rows, Path(root)))
        except _EnoughError:
            pass
        finally:
            torch.set_num_threads(threads)
    assert stopwatch.pace is not None
    return stopwatch.pace


def _probed(
    module: "Reconstruction", rows: int, device: torch.device
) -> tuple["Reconstruction", ThinOpening]:
    """A copy with the same unit first, whose one stage is the last of it, where something learns.

    A search before it would be run over all samples; nothing of it is needed to time a step.
    """
    units, stages = module.foreseen_units(), module.unit_stages
    probed = copy.deepcopy(module)
    probed.units, probed.compile_choice = [], False
    most = min(module.batch_size, _affordable(module, rows, device))
    probed.micro_batch = min(module.micro_batch, most)
    probed.batch_size = most // probed.micro_batch * probed.micro_batch
    opening = ThinOpening(probed.open_unit, probed.foreseen_layers)
    # On the object, before the class's own: a copy of any method is probed.
    vars(probed).update(
        partition=lambda: units,
        preparation=lambda: [],
        unit_stages=lambda unit: stages(unit)[-1:],
        open_unit=opening,
    )
    return probed, opening


def _affordable(module: "Reconstruction", rows: int, device: torch.device) -> int:
    """Samples of a step that the device does in seconds."""
    adapter, limit = module.adapter, OPERATIONS.get(device.type, ACCELERATED)
    state = adapter.example_state(rows, "meta", adapter.compute_dtype(device))
    unit = max(module.foreseen_units(), key=lambda one: len(one.blocks))
    shapes = [s for name in unit.blocks for s in adapter.linear_shapes(name).values()]
    # Forward and backward are about 6 operations a weight and token.
    each = 6.0 * sum(out * in_ for out, in_ in shapes) * adapter.tokens(state).shape[:2].numel()
    if each > MOST * limit:
        raise BudgetError(
            f"a step of one sample takes {each:.0e} operations, and a probe on {device} may take "
            f"{MOST * limit:.0e}. Plan on the device of the fit."
        )
    return max(1, int(limit / each))


def _compiles(module: "Reconstruction", rows: int, device: torch.device) -> bool:
    if module.compile_choice != "auto":
        return module.compile_choice
    adapter = module.adapter
    state = adapter.example_state(rows, "meta", adapter.compute_dtype(device))
    return walk.compiling_pays(module, state, device)


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
        opening: Opens the unit.
        batch: Samples of a step of the fit, and of a micro-batch.
        compiled: Goes into the pace.
    """

    def __init__(self, opening: ThinOpening, batch: tuple[int, int], *, compiled: bool) -> None:
        self.pace: Pace | None = None
        self._thin, self._batch, self._compiled = opening, batch, compiled
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
        spent = len(self._ends) > 2 and self._ends[-1] - self._ends[0] > SECONDS
        if len(self._ends) > STEPS + 1 or spent or trainer.is_last_batch:
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
        later = sorted(steps[1:] or steps)
        recorded = (module.batch_size + 1) * teacher  # what the teacher took when the unit opened
        return Pace(
            opening=max(self._opening + self._thin.spared - recorded, 0.0),
            teacher=teacher,
            student=student,
            first_step=self._whole(steps[0], teacher, module),
            step=self._whole(later[len(later) // 2], teacher, module),
            compiled=self._compiled,
            closing=closing,
        )

    def _whole(self, step: float, teacher: float, module: "Reconstruction") -> float:
        """Seconds of a step of the fit, from one of the probe.

        Each micro-batch rounds the weights once, however many samples it has; forward and backward
        of a sample are taken for three forwards.
        """
        batch, micro_batch = self._batch
        pass_ = step * module.micro_batch / module.batch_size
        samples = min(FORWARDS * module.micro_batch * teacher, pass_)
        grown = pass_ + samples * (micro_batch / module.micro_batch - 1)
        return grown * batch / micro_batch


def _timed(run: Callable[[], Any], device: torch.device) -> float:
    started = _now(device)
    run()
    return _now(device) - started


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.monotonic()
