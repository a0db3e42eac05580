"""What a fit refuses before anything is written; planning asks the same questions."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from lightning.pytorch import Trainer

from recon.engine.artefacts import refuse_full
from recon.engine.data import CalibrationData
from recon.engine.loader import refuse_uneven
from recon.engine.settings import refuse_unsafe_trainer

if TYPE_CHECKING:
    from collections.abc import Callable

    from recon.engine.reconstruction import Reconstruction


def checks(
    trainer: Trainer, module: "Reconstruction", data: CalibrationData
) -> "Iterator[Callable[[], None]]":
    """Questions in order, quick ones first; each raises a ReconError where the answer is no."""
    root, device = Path(trainer.default_root_dir), trainer.strategy.root_device
    processes = trainer.num_devices * trainer.num_nodes
    yield lambda: refuse_unsafe_trainer(trainer, type(module).__name__)
    yield module.adapter.check_description
    # Reads no weights and imports no network.
    yield lambda: data.check(module.adapter)
    yield module.check
    yield lambda: refuse_uneven(
        data.sample_counts[0], module.batch_size, processes, module.micro_batch
    )
    yield lambda: module.check_budget(*data.sample_counts, root, device)
    yield lambda: refuse_full(module, data, root, device)
