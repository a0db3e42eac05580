"""What is written and shown when the last unit is closed."""

import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.table import Table

from recon.atomic import write_json
from recon.engine.native import write_native
from recon.engine.reconstruction import Reconstruction
from recon.engine.result import summary


class RunSummary(Callback):
    """Writes `quantized/`, then `summary.json`, then a table on the terminal."""

    def __init__(self) -> None:
        self._started = time.monotonic()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lightning: a checkpoint is restored; of a finished run nothing but this is called."""
        assert isinstance(pl_module, Reconstruction)
        if not (pl_module.root / "summary.json").exists():  # killed before it was written
            self.on_train_end(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lightning: no unit is left (or the run is being stopped: then nothing is written)."""
        assert isinstance(pl_module, Reconstruction)
        if pl_module.index < len(pl_module.units) or not pl_module.final_error:
            return
        content = summary(pl_module, time.monotonic() - self._started)
        if not trainer.is_global_zero:
            return
        write_native(pl_module, pl_module.root / "quantized")
        write_json(pl_module.root / "summary.json", content)
        show(content, pl_module.root)


def show(content: dict[str, Any], root: Path) -> None:
    """The summary as a table."""
    bits, error, size = content["bits"], content["error"], content["size_bytes"]
    table = Table(title=f"{content['method']} W{bits['weight']}A{bits['activation']}")
    table.add_column("", justify="left")
    table.add_column("round to nearest", justify="right")
    table.add_column("reconstructed", justify="right")
    ratio = error["reconstructed"] / error["round_to_nearest"] if error["round_to_nearest"] else 1.0
    table.add_row(
        "network error, held out",
        f"{error['round_to_nearest']:.3e}",
        f"{error['reconstructed']:.3e} ({ratio:.2f} ×)",
    )
    console = Console()
    console.print(table)
    seconds = content["seconds"]
    console.print(
        f"{content['units']} units, {content['block_forwards_per_sample']:.0f} block forwards per "
        f"sample; calibration {seconds['calibration']:.0f} s, reconstruction "
        f"{seconds['reconstruction']:.0f} s; peak host memory "
        f"{content['peak_memory_bytes']['host'] / 2**30:.2f} GiB; linears "
        f"{size['full_precision']:,} → {size['quantized']:,} bytes "
        f"({size['full_precision'] / max(size['quantized'], 1):.2f} ×)",
        highlight=False,
    )
    console.print(f"Written: {root}/quantized, {root}/summary.json", highlight=False)
