"""How much attention the tokens of a video receive, as small pictures that stay with the run."""

from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from recon.atomic import whole_file
from recon.calibration import ranks
from recon.engine.reconstruction import Reconstruction
from recon.engine.unit import OpenUnit
from recon.models.capabilities import LaysOutTokens

FILE = "salience.safetensors"
FRAMES, SIDE = 8, 24
"""Most frames, and most rows or columns, of a picture: 42 units of CogVideoX-5B take 0.4 MB."""


class TokenSalience(Callback):
    """Writes `salience.safetensors`: the picture of each closed unit as `unit=003`.

    A picture is [frames, rows, columns], float32: attention column sums S_j (S²Q-VDiT, eq. 11) of
    the teacher over their mean over all tokens, averaged over the calibration samples and over
    neighbouring tokens. Only where the method records attention and tokens stand on a grid.
    """

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lightning: the module has not closed its unit yet, no checkpoint is behind it."""
        assert isinstance(pl_module, Reconstruction)
        opened, adapter = pl_module.opened, pl_module.adapter
        if opened is None or not opened.record.salience or not isinstance(adapter, LaysOutTokens):
            return
        picture = _mean_picture(pl_module, opened, adapter)
        if trainer.is_global_zero:
            _add(pl_module.root / FILE, pl_module.index, picture)


def _mean_picture(module: Reconstruction, opened: OpenUnit, adapter: LaysOutTokens) -> Tensor:
    """Over the samples of all processes; those of other shapes are brought to that of the first."""
    shape = picture_shape(adapter.token_grid(module.frontier.sample(0))[1])
    total = torch.zeros(shape, dtype=torch.float64)
    for index, salience in opened.record.salience.items():
        tokens, grid = adapter.token_grid(module.frontier.sample(index))
        relative = (salience / salience.mean(dim=1, keepdim=True)).mean(dim=0)  # over the batch
        laid_out = relative[tokens].reshape(1, *grid).cpu()
        total += functional.adaptive_avg_pool3d(laid_out, shape)[0]
    return (ranks.total(total.to(module.run_device)).cpu() / module.sample_count).float()


def picture_shape(grid: tuple[int, int, int]) -> tuple[int, int, int]:
    """Frames, rows and columns of the picture of a grid of tokens, which keeps its proportions.

    >>> picture_shape((13, 30, 45)), picture_shape((3, 8, 8))
    ((7, 15, 23), (3, 8, 8))
    """
    frames, rows, columns = grid
    pace, side = -(-frames // FRAMES), -(-max(rows, columns) // SIDE)
    return -(-frames // pace), -(-rows // side), -(-columns // side)


def _add(file: Path, index: int, picture: Tensor) -> None:
    """Writes the file anew with a further picture."""
    # What an earlier attempt left is not this run's; a continued one has its earlier units here.
    kept = load_file(file) if index and file.exists() else {}
    with whole_file(file) as aside:
        save_file({**kept, f"unit={index:03d}": picture.contiguous()}, aside)
