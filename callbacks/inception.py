"""The network whose features FID, KID, precision and recall are published with."""

import importlib.util
import pickle
from pathlib import Path

import torch
from torch import Tensor, nn

from recon.errors import ConfigError

WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"
"""torch-fidelity's file of the network that the first publications used."""


def inception_unavailable() -> str | None:
    """Why Inception cannot be had without a download; None if it can."""
    if importlib.util.find_spec("torch_fidelity") is None:
        return "Inception is not available: torch-fidelity is not installed"
    return None if _hub_file().is_file() else f"Inception is not available: {_hub_file()} missing"


def _hub_file() -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS


class Inception(nn.Module):
    """Pool features of Inception v3, as torch-fidelity and torchmetrics compute them.

    Pictures are rounded to 8 bits and resized to 299 x 299 inside.

    Args:
        weights: File of the weights; null: torch-fidelity's own in the cache of torch.hub. Nothing
            is downloaded.

    Raises:
        ConfigError: torch-fidelity or the weights are not there, or they are damaged.
    """

    num_features = 2048

    def __init__(self, weights: str | None = None) -> None:
        super().__init__()
        file = _hub_file() if weights is None else Path(weights)
        if importlib.util.find_spec("torch_fidelity") is None or not file.is_file():
            raise ConfigError(
                f"The extractor Inception needs the package torch-fidelity and the file {file}. "
                "Install and download both, pass another path as `weights`, or name an extractor "
                "of your own in metrics.distribution.extractor."
            )
        try:
            torch.load(file, weights_only=True)  # below, a file that holds more would be executed
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise ConfigError(
                f"{file} is damaged, or holds more than tensors. Download it again."
            ) from error
        from torchmetrics.image.fid import NoTrainInceptionV3

        self.network = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(file))

    def forward(self, pictures: Tensor) -> Tensor:
        """Features [batch, 2048] of pictures [batch, 3, height, width] in [0, 1]."""
        return self.network((pictures * 255).round().byte())
