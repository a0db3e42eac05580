"""What a format is to the rest of this room."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn

from recon.errors import ExportError
from recon.export.finished import Finished
from recon.layers.quant_linear import QuantLinear

ROUNDING = 1e-5
"""Relative difference (root mean square) that float32 arithmetic in another order may leave."""


@dataclass(frozen=True)
class Written:
    """What a format wrote, and what must come back from it."""

    network: nn.Module | None
    """The network as its file describes it, to be compared with what is loaded; None: there is no
    other than that of `recon.load`, which is compared in any case."""
    library: str
    """Whose loader reads it: diffusers, transformers or recon."""
    folder: Path
    """Folder that the loader is given."""
    linear_bytes: int
    """Bytes of everything that stands for the quantised weights; biases not counted."""
    runs_as: tuple[str, ...]
    """For each kind of layer, what computes it, on what hardware, or "simulation"."""
    dtype: str = "float32"
    """Floating type in which it is compared."""
    load_dtype: str | None = None
    """Floating type to load a pipeline of diffusers in, for its parts to fit the network; None: its
    loader finds one itself."""
    file_tolerance: float = 0.0
    """Relative difference allowed between `network` and what is loaded."""
    folding_tolerance: float | None = None
    """Relative difference allowed between `network` in float32 and `recon.load`, where factors were
    moved into other tensors; None: every number stands in a layer, and is compared there."""
    run_tolerance: float = 0.0
    """Relative difference allowed between what is loaded and `recon.load`."""
    rounds_otherwise: bool = False
    """Whether activations may fall on the other neighbour at ties. From layer to layer more of them
    do, until the outputs differ as two independent roundings do."""
    quantized: bool = True
    """Whether the loaded layers are quantised ones."""
    notes: tuple[str, ...] = field(default=())
    """What a user must know, in sentences."""


class Format(ABC):
    """One way to write a finished run."""

    name: ClassVar[str]
    libraries: ClassVar[tuple[str, ...]]
    """Whose public classes it is for."""
    packages: ClassVar[Mapping[str, str]] = {}
    """Modules that writing and loading need, and the distributions that hold them."""
    weights_only: ClassVar[bool] = False
    """Whether activations are left as they are, on purpose and said so."""

    @abstractmethod
    def misfits(self, finished: Finished) -> list[str]:
        """Sentences about layers that the format cannot hold; empty if it can hold them all."""

    @abstractmethod
    def stored_bits(self, num_bits: int) -> int:
        """Bits that a weight of `num_bits` takes on disk."""

    @abstractmethod
    def write(self, finished: Finished, folder: Path) -> Written:
        """Writes the network into an empty folder, as `Written.folder` or below."""

    def as_loaded(
        self, finished: Finished, dtype: torch.dtype
    ) -> Iterator[tuple[str, QuantLinear]]:
        """The layers of the run, one after the other, with the numbers that the loaded ones have.

        By default their own: every number arrives as it is.

        Args:
            finished: The run.
            dtype: Floating type in which they are loaded.
        """
        yield from finished.layers.items()

    def obstacles(self, finished: Finished) -> list[str]:
        """Everything that speaks against this run in this format; empty if nothing does."""
        found = self.misfits(finished)
        if finished.library not in self.libraries:
            found.append(
                f"{type(finished.empty).__name__} is a class of {finished.library}, which does not "
                f"load it; {' and '.join(self.libraries)} can"
            )
        products = finished.native.manifest["attentions"]
        if products and not self.weights_only:
            found.append(
                f"The products of {len(products)} attentions are quantised, such as those of "
                f"{next(iter(products))}, which no loader computes"
            )
        if not self.weights_only:
            found += _outside(finished)
        unsaved = finished.native.adapter.unsaved()
        if unsaved is not None:
            found.append(unsaved)
        return found

    def require_packages(self) -> None:
        """Does nothing if the libraries are there.

        Raises:
            ExportError: Names those that are not.
        """
        missing = [held for module, held in self.packages.items() if find_spec(module) is None]
        if missing:
            raise ExportError(
                f"Format {self.name} needs {', '.join(missing)}, which "
                f"{'is' if len(missing) == 1 else 'are'} not installed. Run `pip install "
                "'recon-ptq[export]'`; `recon export --format bf16` and native need nothing more."
            )


def _outside(finished: Finished) -> list[str]:
    """What is quantised and is no Linear of its own, as a sentence; empty if there is nothing."""
    empty, copies = finished.empty, finished.native.manifest["copies"]
    layers = [n for n in finished.layers if isinstance(empty.get_submodule(n), nn.Conv2d)]
    said = [f"{layers[0]} is a quantised convolution"] if layers else []
    if copies:
        said.append(f"{len(copies)} linears are equal to one that is kept once")
    if not said:
        return []
    return [f"{' and '.join(said)}, which loaders do not know; model.stem_and_head null avoids it"]


def public_folder(finished: Finished, folder: Path) -> Path:
    """Where in an export the network stands: as in the teacher's pipeline."""
    inside = finished.native.adapter.subfolder
    return folder / inside if inside else folder
