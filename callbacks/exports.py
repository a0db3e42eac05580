"""The finished run in the formats of other libraries, when a fit ends."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from lightning.pytorch import Callback, LightningModule, Trainer

from recon.errors import ExportError

FormatName = Literal["native", "torchao", "auto-round", "compressed-tensors", "bf16"]


class ExportAtEnd(Callback):
    """Calls `recon export` once the results of a run are written, in a process of its own.

    A fit is refused where a format foreseeably cannot hold it (`recon.export.foreseen`). What
    cannot be exported all the same leaves the run as complete as it is; the command then ends with
    an error. Folders of `<run folder>/exports` that are there already are left alone.

    Args:
        formats: Of `recon export`; none: nothing is exported.
    """

    def __init__(self, formats: Sequence[FormatName] = ()) -> None:
        self.formats = tuple(formats)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lightning: all callbacks have seen the end of training, the last unit is closed."""
        root = Path(trainer.default_root_dir)
        if not trainer.is_global_zero or not (root / "summary.json").is_file():
            return
        failed = [name for name in self.formats if not self._written(root, name)]
        if failed:
            names = " ".join(failed)
            raise ExportError(
                f"The run in {root} is finished and complete, but not exported as "
                f"{', '.join(failed)}; what was wrong stands above. `recon export --run {root} "
                f"--format {names}` tries again."
            )

    def _written(self, root: Path, name: str) -> bool:
        if (root / "exports" / name).exists():
            return True
        # The network of the fit is still in this process's memory; another starts without it.
        command = [sys.executable, "-m", "recon", "export", "--run", str(root), "--format", name]
        return subprocess.run(command, check=False).returncode == 0
