"""recon's own format: lossless, for every method; `recon.load` reads it."""

import shutil
from pathlib import Path
from typing import ClassVar

from recon.export.finished import Finished
from recon.export.format import Format, Written


class NativeFormat(Format):
    """The run's `quantized` folder, file by file."""

    name: ClassVar = "native"
    libraries: ClassVar = ("diffusers", "transformers")

    def misfits(self, finished: Finished) -> list[str]:
        """Nothing: it is what the run left."""
        return []

    def obstacles(self, finished: Finished) -> list[str]:
        """Nothing: the adapter comes with it, whatever the public class does."""
        return []

    def stored_bits(self, num_bits: int) -> int:
        """As many as it has."""
        return num_bits

    def write(self, finished: Finished, folder: Path) -> Written:
        """Copies the files; their checksums are in the manifest and are read with them."""
        source = finished.native.folder
        for file in ("manifest.json", *finished.native.manifest["files"]):
            shutil.copyfile(source / file, folder / file)
        layers = finished.layers
        held = {id(t): t for q in layers.values() for t in q.state_dict(keep_vars=True).values()}
        return Written(
            network=None,
            library="recon",
            folder=folder,
            linear_bytes=sum(tensor.nbytes for tensor in held.values()),
            runs_as=("recon.load: simulation on any hardware, no gain in speed",),
        )
