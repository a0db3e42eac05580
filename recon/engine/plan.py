"""What a fit will do and take, from its configuration, before anything heavy runs.

Counts are those of the code that runs in a fit, on tensors without memory; times are from a few
steps on random inputs. No weight is read unless steps are timed.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from recon.calibration.memory import Place, free_bytes
from recon.engine.artefacts import Artefacts, artefacts
from recon.engine.attention import quantized_names
from recon.engine.data import CalibrationData
from recon.engine.footprint import (
    HEAP,
    Footprint,
    footprint,
    sampling_bytes,
    stream_needs,
    stream_place,
)
from recon.engine.foresight import closed_layers
from recon.engine.inventory import Left, Quantised, left_rows, quantised_rows
from recon.engine.loader import refuse_uneven
from recon.engine.probe import Pace, pace
from recon.engine.unit import Unit
from recon.errors import ConfigError, ReconError, WeightsError
from recon.layers.quant_linear import QuantLinear

if TYPE_CHECKING:
    from recon.engine.reconstruction import Reconstruction


COMPILING = 60.0
"""Seconds of compiling a unit's step, once a run. Source: `recon.engine.assembly.compile_pays`."""


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak, estimated."""

    libraries: int
    """Host: interpreter and libraries, measured in the process that plans."""
    heap: int
    """Host: what the allocator keeps of freed blocks, calibrated."""
    sampling: int
    """Weights that calibration's sampling holds, on the device."""
    uncounted: list[str]
    """Parts of the pipeline that sampling needs too, without weights or a config.json of use."""
    reconstruction: Footprint
    streams: dict[Place, int]
    """What one process's streams take in each place."""
    streams_in: Place | None
    """Where they go; None: they fit nowhere."""
    host: int
    device: int
    """Of an accelerator; 0 on a CPU."""


@dataclass(frozen=True)
class Disk:
    """Bytes under the run folder, estimated."""

    streams: int
    artefacts: Artefacts
    free: int

    @property
    def peak(self) -> int:
        """Most that is there at a time."""
        return self.streams + self.artefacts.peak


@dataclass(frozen=True)
class Seconds:
    """What a fit takes, from a few measured steps."""

    calibration: float
    reconstruction: float
    pace: Pace


@dataclass(frozen=True)
class Plan:
    """All that is known of a fit before it starts."""

    method: str
    network: str
    folder: str
    device: str
    processes: int
    weights_found: bool
    stored_as: str
    """Floating type of the weights; where there are none, what is taken for it."""
    blocks: int
    units: int
    units_known: bool
    """False where the method cuts the network by what it finds; then units are the largest."""
    steps: int
    """Of the whole run, over all stages."""
    quantised: list[Quantised]
    attentions: int
    """Attentions whose products are quantised."""
    left: list[Left]
    memory: Memory
    disk: Disk
    seconds: Seconds | None
    why_untimed: str
    """Why `seconds` is None; empty where it is not."""
    processes_that_divide: list[int]
    """Numbers of processes among which the batch divides."""
    micro_batch: int
    """Samples of a micro-batch; above 1 a smaller one divides among more processes."""
    refusals: list[str]
    """Why a fit would be refused, one sentence each; empty if it would start."""

    @property
    def quantised_parameters(self) -> int:
        """Weights that become codes."""
        return sum(row.parameters for row in self.quantised)


@dataclass
class Setting:
    """What is planned."""

    module: "Reconstruction"
    data: CalibrationData
    device: torch.device
    root: Path
    processes: int
    checks: Iterable[Callable[[], None]]
    """Questions of a fit, as `recon.engine.checks.checks` gives them."""
    libraries: int
    """Bytes of interpreter and libraries."""


def planned(setting: Setting, *, probe: bool) -> tuple[Plan, dict[str, QuantLinear]]:
    """The plan, and the layers that the run will leave, with numbers that mean nothing.

    Args:
        setting: What is planned. Its module gets units and number of samples.
        probe: Whether a few steps are timed.

    Raises:
        ReconError: There is no network to plan for: its config.json is missing or of another kind.
    """
    module, data, adapter = setting.module, setting.data, setting.module.adapter
    _ = adapter.empty_network()
    refusals = _refusals(setting.checks)
    found = _weights_found(module)
    if not found and adapter.dtype == "auto" and setting.device.type != "cpu":
        adapter.dtype = "bfloat16"
    units = module.units = module.foreseen_units()
    module.sample_count = data.sample_counts[0]
    layers = closed_layers(module, units)
    memory = _memory(setting, units)
    on_disk = memory.streams["disk"] if memory.streams_in == "disk" else 0
    disk = Disk(
        streams=on_disk * setting.processes,
        artefacts=artefacts(module, units, layers, data, setting.device),
        free=free_bytes("disk", setting.device, setting.root),
    )
    seconds, untimed = _seconds(setting, units, probe=probe, found=found)
    plan = Plan(
        method=type(module).__name__,
        network=type(adapter.empty_network()).__name__,
        folder=str(adapter.folder),
        device=str(setting.device),
        processes=setting.processes,
        weights_found=found,
        stored_as=str(adapter.stored_dtype).removeprefix("torch."),
        blocks=len(adapter.block_names),
        units=len(units),
        units_known=not module.preparation(),
        steps=module.planned_steps,
        quantised=quantised_rows(module, units),
        attentions=len(quantized_names(module, adapter.block_names)),
        left=left_rows(module, set(layers)),
        memory=memory,
        disk=disk,
        seconds=seconds,
        why_untimed=untimed,
        processes_that_divide=_dividing(module, data),
        micro_batch=module.micro_batch,
        refusals=refusals,
    )
    return plan, layers


def _refusals(checks: Iterable[Callable[[], None]]) -> list[str]:
    found: dict[str, None] = {}
    for check in checks:
        try:
            check()
        except ReconError as error:
            found[str(error)] = None
    return list(found)


def _weights_found(module: "Reconstruction") -> bool:
    try:
        module.adapter.weights.check()
    except WeightsError:
        return False
    return True


# Memory


def _memory(setting: Setting, units: list[Unit]) -> Memory:
    module, data, device = setting.module, setting.data, setting.device
    open_unit = footprint(module, units, data, device, setting.processes)
    streams = stream_needs(module, data, device, setting.processes)
    place = stream_place(module, streams, device, setting.root, setting.processes)
    network, parts, uncounted = 0, 0, list[str]()
    if data.sampling.calls:
        network, parts, uncounted = sampling_bytes(module.adapter, device)
    sampling = network + parts
    held = streams[place] if place in ("device", "ram") else 0
    on_cpu = device.type == "cpu"
    computing = max(sampling, open_unit.total + (held if on_cpu or place == "device" else 0))
    beside = computing if on_cpu else max(parts, held if place == "ram" else 0)
    return Memory(
        libraries=setting.libraries,
        heap=HEAP,
        sampling=sampling,
        uncounted=uncounted,
        reconstruction=open_unit,
        streams=streams,
        streams_in=place,
        host=setting.libraries + HEAP + beside,
        device=0 if on_cpu else computing,
    )


# Time


def _seconds(
    setting: Setting, units: list[Unit], *, probe: bool, found: bool
) -> tuple[Seconds | None, str]:
    if not probe:
        return None, "not measured (--no-probe)"
    if not found:
        return None, "not measured: the weights were not found"
    try:
        measured = pace(setting.module, setting.data, setting.device)
    except ReconError as error:
        return None, f"not measured: {error}"
    return _extrapolated(setting, units, measured), ""


def _extrapolated(setting: Setting, units: list[Unit], measured: Pace) -> Seconds:
    """Seconds of the whole run; a step in which nothing learns runs a block over all samples."""
    module, data, world = setting.module, setting.data, setting.processes
    samples, held_out, rows = data.sample_counts
    mine, unseen = ceil(samples / world), ceil(held_out / world)
    length = len(units[0].blocks)
    carried = mine + unseen
    total = 0.0
    for unit in units:
        share = len(unit.blocks) / length
        *searches, learning = module.unit_stages(unit)
        passes = carried * measured.teacher + (carried + unseen) * measured.student
        searched = sum(stage.steps for stage in searches) * mine * measured.student / length
        learned = learning.steps * measured.step / world
        total += share * (measured.opening + passes + measured.closing + learned) + searched
    total += max(measured.first_step - measured.step, 0.0) + COMPILING * measured.compiled
    # A pair of neighbours: the teacher through both, and past one of them.
    pairs = sum(stage.steps for stage in module.preparation())
    total += pairs * 3 * carried * measured.teacher / length
    sampling = data.sampling
    network = measured.teacher * len(module.adapter.block_names) / length
    called = ceil(sampling.calls / world) * network * sampling.rows / rows
    return Seconds(called, total, measured)


def _dividing(module: "Reconstruction", data: CalibrationData) -> list[int]:
    samples = data.sample_counts[0]
    found = []
    for world in range(1, module.batch_size + 1):
        try:
            refuse_uneven(samples, module.batch_size, world, module.micro_batch)
        except ConfigError:
            continue
        found.append(world)
    return found
