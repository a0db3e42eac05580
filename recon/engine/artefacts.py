"""Bytes that a run leaves on disk, or needs there on its way, before it has begun."""

from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from recon.calibration.memory import free_bytes
from recon.engine.data import CalibrationData
from recon.engine.footprint import stream_needs, stream_place
from recon.engine.foresight import closed_layers, opened_layers
from recon.engine.result import linear_bytes
from recon.engine.stem_and_head import copies
from recon.engine.unit import Unit
from recon.errors import BudgetError
from recon.layers.quant_linear import QuantLinear
from recon.models.adapter import ModelAdapter

if TYPE_CHECKING:
    from recon.engine.reconstruction import Reconstruction

ROW = 330
"""Bytes of a sample's words, scores and lengths. Source: the sets of configs/ptq4dit.yaml (296 a
sample beside its tensors) and configs/s2q_vdit.yaml (369)."""

CANDIDATE = 129
"""Bytes of a scored candidate in calibration.json. Source: the 1,200 of configs/ptq4dit.yaml."""

CHECKPOINTS = 3
"""Files at a time, at most: behind a unit, inside one, and one that is being written."""


@dataclass(frozen=True)
class Artefacts:
    """Bytes of a run folder by what takes them."""

    calibration: int
    """The set."""
    candidates: int
    """Samples it is chosen from; gone once it is made."""
    checkpoints: int
    """All files that may be there at a time."""
    quantized: int
    """Codes, and every tensor that is not quantised."""

    @property
    def peak(self) -> int:
        """Most that is there at a time: candidates go before the first checkpoint comes."""
        return self.calibration + max(self.candidates, self.checkpoints + self.quantized)


def unquantized_bytes(module: "Reconstruction", layers: dict[str, QuantLinear]) -> int:
    """Bytes of the tensors that a result keeps as they are stored."""
    adapter, replaced = module.adapter, {*layers, *copies(module)}
    shapes = {n: tuple(t.shape) for n, t in adapter.empty_network().state_dict().items()}
    kept = (shape for name, shape in shapes.items() if name.removesuffix(".weight") not in replaced)
    return adapter.stored_dtype.itemsize * sum(prod(shape) for shape in kept)


def quantized_bytes(module: "Reconstruction", layers: dict[str, QuantLinear]) -> int:
    """Bytes of `quantized/`."""
    return linear_bytes(layers.values())["quantized"] + unquantized_bytes(module, layers)


def calibration_bytes(data: CalibrationData, adapter: ModelAdapter, dtype: torch.dtype) -> int:
    """Bytes of the calibration set."""
    samples, held_out, _ = data.sample_counts
    each = data.sample_bytes(adapter, dtype) + ROW
    return (samples + held_out) * each + CANDIDATE * data.sampling.scored


def artefacts(
    module: "Reconstruction",
    units: list[Unit],
    layers: dict[str, QuantLinear],
    data: CalibrationData,
    device: torch.device,
) -> Artefacts:
    """What a run of `module` on `data` puts on disk beside its streams.

    Args:
        module: The method.
        units: Its units.
        layers: The closed layers of all units.
        data: The data module.
        device: Where the network computes.
    """
    adapter, dtype = module.adapter, module.adapter.compute_dtype(device)
    longest = max(units, key=lambda unit: len(unit.blocks))
    opened = torch.nn.ModuleList(opened_layers(module, longest).values())
    learned = 4 * sum(parameter.numel() for parameter in opened.parameters())
    held = sum(buffer.nbytes for buffer in opened.buffers())
    # An open unit's parameters with their two moments, beside the codes of those before it.
    checkpoint = linear_bytes(layers.values())["quantized"] + 3 * learned + held
    return Artefacts(
        calibration=calibration_bytes(data, adapter, dtype),
        candidates=data.sampling.spilled * data.sample_bytes(adapter, dtype),
        checkpoints=CHECKPOINTS * checkpoint,
        quantized=quantized_bytes(module, layers),
    )


def refuse_full(
    module: "Reconstruction", data: CalibrationData, root: Path, device: torch.device
) -> None:
    """Does nothing if the run folder's disk has room for the streams it will hold and the results.

    What the folder holds already, of a run to be continued, counts as room.

    Raises:
        BudgetError: Names what is needed and what is free.
    """
    units = module.foreseen_units()
    needed = artefacts(module, units, closed_layers(module, units), data, device)
    streams = stream_needs(module, data, device)
    place = stream_place(module, streams, device, root)
    on_disk = streams["disk"] if place == "disk" else 0
    present = sum(f.stat().st_size for f in root.rglob("*") if f.is_file()) if root.exists() else 0
    room = free_bytes("disk", device, root) + present
    if on_disk + needed.peak > room:
        parts = ", ".join(f"{name} {value:,}" for name, value in asdict(needed).items())
        raise BudgetError(
            f"The run needs up to {on_disk + needed.peak:,} bytes in {root} (streams {on_disk:,}, "
            f"{parts}), and {room:,} are free. Free some space, set trainer.default_root_dir to "
            "another disk, or give the streams memory (model.memory.ram)."
        )
