"""Checkpoints are written beside their target, synced, then renamed."""

from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from recon.atomic import whole_file


class AtomicCheckpointIO(TorchCheckpointIO):
    """A checkpoint file is either whole or not there, whenever the process dies."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """Writes `checkpoint` to `path`."""
        with whole_file(Path(path)) as aside, aside.open("wb") as file:
            torch.save(checkpoint, file)
