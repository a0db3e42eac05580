"""How long a network takes in full precision and as exported, on this machine."""

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from recon.errors import ExportError
from recon.export import fresh, reload
from recon.export.finished import Finished
from recon.export.folder import REPORT
from recon.models.adapter import FloatingType


@dataclass(frozen=True)
class Settings:
    """What is timed, and how often.

    Raises:
        ExportError: A number is out of range.
    """

    runs: int = 5
    """Timed rounds, behind one that warms up."""
    sampling_steps: int | None = None
    """Of a whole sample; None: those of the run's evaluation. 0: no sample is made."""
    compiled: bool = True
    """Whether `torch.compile` is timed too."""
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.runs < 1:
            raise ExportError(f"--runs must be at least 1, got {self.runs}.")
        if self.sampling_steps is not None and self.sampling_steps < 0:
            raise ExportError(f"--steps must be at least 0, got {self.sampling_steps}.")


@dataclass(frozen=True)
class Subject:
    """One network on disk, in one floating type."""

    name: str
    dtype: FloatingType
    folder: Path
    """What the public loader is given."""

    @property
    def bytes(self) -> int:
        """Of its weights on disk."""
        return sum(file.stat().st_size for file in self.folder.glob("*.safetensors"))


def subjects(finished: Finished, name: str) -> list[Subject]:
    """The teacher in float32 and bfloat16, and the export in both.

    Raises:
        ExportError: The run has no such export, or none that a public class loads; or its teacher
            is gone.
    """
    export = finished.root / "exports" / name
    if not (export / REPORT).is_file():
        raise ExportError(
            f"{export} is no export. Make it with `recon export --run {finished.root} --format "
            f"{name}`."
        )
    if name == "native":
        raise ExportError("Format native is a simulation, which has no speed of its own.")
    if not finished.teacher.is_dir():
        raise ExportError(
            f"The teacher's folder {finished.teacher} is not there, so that there is nothing to "
            "compare with. Put it back."
        )
    inside = finished.native.adapter.subfolder
    places = {"full precision": finished.teacher_adapter().network_folder, name: export / inside}
    types: tuple[FloatingType, ...] = ("float32", "bfloat16")
    return [Subject(label, dtype, place) for label, place in places.items() for dtype in types]


def measure(finished: Finished, chosen: list[Subject], settings: Settings) -> dict[str, Any]:
    """Medians of every subject, taken in turn in one process, and each one's peak memory.

    Returns:
        For each subject its medians in seconds, by what was timed; bytes on disk and at the peak
        of one call; and how many times faster the export is than full precision, type by type.

    Raises:
        ExportError: A network does not load.
    """
    device = torch.device(settings.device)
    networks = {subject: _load(finished, subject, device) for subject in chosen}
    rows: dict[Subject, dict[str, Any]] = {
        subject: {
            "network": subject.name,
            "dtype": subject.dtype,
            "disk_bytes": subject.bytes,
            "peak_bytes": _peak(finished, subject, networks[subject], device),
            "seconds": {},
        }
        for subject in chosen
    }
    for mode in ("eager", "compiled")[: 1 + settings.compiled]:
        if mode == "compiled":
            for network in networks.values():
                network.compile(dynamic=False)
        for what in ("step", "sample"):
            timed = {s: _work(what, finished, s, n, settings) for s, n in networks.items()}
            works = {subject: work for subject, work in timed.items() if work is not None}
            for subject, median in _medians(works, settings.runs, device).items():
                rows[subject]["seconds"][f"{what}, {mode}"] = median
    return {
        "device": _name(device),
        "integer_dot_products": device.type != "cpu" or torch.cpu._is_vnni_supported(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "sampling_steps": _sampling_steps(finished, settings),
        "runs": settings.runs,
        "networks": list(rows.values()),
        "times_faster": _ratios(list(rows.values())),
    }


def _load(finished: Finished, subject: Subject, device: torch.device) -> nn.Module:
    request = {
        "library": finished.library,
        "class": type(finished.empty).__name__,
        "folder": str(subject.folder),
        "dtype": subject.dtype,
    }
    return fresh.load(request).to(device).requires_grad_(False)


def _work(
    what: str, finished: Finished, subject: Subject, network: nn.Module, settings: Settings
) -> Callable[[], None] | None:
    """One call of the network, or one whole sample; None where none can be made."""
    adapter = finished.teacher_adapter(subject.dtype)
    if what == "step":
        call = adapter.call_arguments(finished.samples[0], settings.device)
        return lambda: network(**call, return_dict=False)
    steps = _sampling_steps(finished, settings)
    if not steps:
        return None
    prompt = finished.calibration.held_out.facts(0)["prompt"]
    pipeline = adapter.pipeline(settings.device, network)
    guidance = finished.data_settings["guidance"]
    return lambda: pipeline.generate([prompt], [0], steps=steps, guidance=guidance)


def _sampling_steps(finished: Finished, settings: Settings) -> int:
    if finished.library != "diffusers" or "guidance" not in finished.data_settings:
        return 0
    if settings.sampling_steps is not None:
        return settings.sampling_steps
    return int(finished.data_settings["steps"])


@torch.no_grad()
def _medians(
    works: dict[Subject, Callable[[], None]], runs: int, device: torch.device
) -> dict[Subject, float]:
    seconds: dict[Subject, list[float]] = {subject: [] for subject in works}
    for run in range(runs + 1):
        for subject, work in works.items():
            taken = _seconds(work, device)
            if run:
                seconds[subject].append(taken)
    return {subject: statistics.median(taken) for subject, taken in seconds.items()}


def _seconds(work: Callable[[], None], device: torch.device) -> float:
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def _peak(finished: Finished, subject: Subject, network: nn.Module, device: torch.device) -> int:
    """Bytes at the peak of one call: of the device, or of a process that only loads and calls."""
    adapter = finished.teacher_adapter(subject.dtype)
    call = adapter.call_arguments(finished.samples[0], device)
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        with torch.no_grad():
            network(**call)
        held = sum(t.nbytes for t in (*network.parameters(), *network.buffers()))
        return torch.cuda.max_memory_allocated(device) - before + held
    with tempfile.TemporaryDirectory() as folder:
        inputs = Path(folder) / "inputs.safetensors"
        save_file(fresh.flattened([call]), inputs)
        public = type(finished.empty).__name__
        _, facts = reload.answered(finished.library, public, subject.folder, subject.dtype, inputs)
    return int(facts["peak_bytes"])


def _ratios(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Full precision's seconds over the fastest export's, by floating type and what was timed."""
    full = [row for row in rows if row["network"] == "full precision"]
    exported = [row for row in rows if row["network"] != "full precision"]
    return {
        row["dtype"]: {
            timed: seconds / min(other["seconds"][timed] for other in exported)
            for timed, seconds in row["seconds"].items()
        }
        for row in full
    }


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.backends.cpu.get_cpu_capability()} CPU"
