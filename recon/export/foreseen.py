"""Size of each export of a run that is still to be made, or what speaks against it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import device as Device  # noqa: N812 - a type here

from recon.engine.artefacts import unquantized_bytes
from recon.engine.attention import quantized_names
from recon.engine.foresight import closed_layers
from recon.engine.native import Native
from recon.engine.reconstruction import Reconstruction
from recon.engine.result import linear_bytes
from recon.engine.stem_and_head import copies
from recon.errors import ExportError
from recon.export.exporting import FORMATS
from recon.export.finished import Finished
from recon.export.format import Format
from recon.layers.quant_linear import QuantLinear


@dataclass(frozen=True)
class Foreseen:
    """One format."""

    format: str
    bytes: int
    """Of the network's files, about; the pipeline's other parts are not counted."""
    obstacles: list[str]
    """Why it would be refused; empty if it would not. Step sizes that a format cannot hold show
    only when they are learned."""


@dataclass(frozen=True)
class _ForeseenNative(Native):
    """A result of which there are layers, and no folder."""

    made: Mapping[str, QuantLinear]

    def layers(self, device: Device | str = "cpu") -> dict[str, QuantLinear]:
        """The foreseen layers."""
        return dict(self.made)


def foreseen_exports(module: Reconstruction, layers: dict[str, QuantLinear]) -> list[Foreseen]:
    """Every format, asked about a run as it would end.

    Args:
        module: The method.
        layers: As `recon.engine.foresight.closed_layers` gives them.
    """
    adapter = module.adapter
    attentions = dict.fromkeys(quantized_names(module, adapter.block_names))
    further = copies(module)
    facts = {"attentions": attentions, "copies": further}
    native = _ForeseenNative(adapter.folder, facts, adapter, layers)
    finished = Finished(Path(), native)
    rest = unquantized_bytes(module, layers)
    copied = sum(layers[name].in_features * layers[name].out_features for name in further.values())
    return [
        Foreseen(
            form.name,
            _bytes(form, layers, module.weight.num_bits, rest, adapter.stored_dtype.itemsize)
            + (2 * copied if form.weights_only else 0),
            form.obstacles(finished),
        )
        for form in FORMATS.values()
    ]


def refuse_unexportable(module: Reconstruction, names: Sequence[str]) -> None:
    """Does nothing if a fit may end with an export in each of these formats.

    Args:
        module: The method.
        names: What `export.formats` holds.

    Raises:
        ExportError: The packages of a format are missing, or it would not hold the run.
    """
    if not names:
        return
    for name in names:
        FORMATS[name].require_packages()
    found = foreseen_exports(module, closed_layers(module, module.foreseen_units()))
    refused = {e.format: e.obstacles for e in found if e.format in names and e.obstacles}
    if not refused:
        return
    reasons = "; ".join(f"{name}: {'. '.join(said)}" for name, said in refused.items())
    holding = ", ".join(export.format for export in found if not export.obstacles)
    raise ExportError(
        f"export.formats names {', '.join(refused)}, which cannot hold what this fit would leave "
        f"({reasons}). Formats that can: {holding}. Leave the others out of export.formats."
    )


def _bytes(
    form: Format, layers: dict[str, QuantLinear], num_bits: int, rest: int, itemsize: int
) -> int:
    weights = sum(layer.out_features * layer.in_features for layer in layers.values())
    if form.weights_only:  # every tensor in 16 bits, transforms merged
        return 2 * weights + 2 * rest // itemsize
    codes = sum(layer.codes.nbytes for layer in layers.values() if layer.codes is not None)
    beside = linear_bytes(layers.values())["quantized"] - codes
    stored = form.stored_bits(num_bits)
    return (codes if stored == num_bits else weights * stored // 8) + beside + rest
