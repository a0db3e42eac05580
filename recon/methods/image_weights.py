"""ω of a picture's tokens by the answer's gradient, before Q-VLM cuts the network into units."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from recon.engine import modality, vision
from recon.engine.staged import OpenStage
from recon.engine.unit import Stage, StageState
from recon.errors import ConfigError
from recon.models.capabilities import SeesPictures

if TYPE_CHECKING:
    from recon.methods.q_vlm import QVLM

STAGE = "image_weights"


def stages(method: "QVLM") -> list[Stage]:
    """One step, if ω is to follow the gradient."""
    return [Stage(STAGE, 1)] if method.image_weight == "mbq" else []


class ImageWeights(OpenStage):
    """One pass over the calibration set.

    Args:
        method: Whose network it is.

    Source: MBQ (arXiv 2412.19509).
    """

    def __init__(self, method: "QVLM") -> None:
        self._method = method

    def state(self) -> dict[str, Tensor]:
        """ω behind each block."""
        return {"weights": torch.zeros(len(self._method.adapter.block_names))}

    def step(self, step: int, state: StageState) -> dict[str, float]:
        """All of them at once.

        Raises:
            ConfigError: No calibration sample has a picture.
        """
        adapter = self._method.adapter
        assert isinstance(adapter, SeesPictures)
        if not vision.samples_with_pictures(self._method, adapter)[0]:
            raise ConfigError(
                "model.image_weight is mbq, which weighs pictures by what the answers to them "
                "depend on, and 0 calibration samples have pictures. Add samples with pictures "
                "(data.dataset, data.columns.image), or set model.image_weight to 1."
            )
        weights = state["weights"].copy_(modality.image_weights(self._method))
        return {"image_weight": float(weights.mean())}

    def conclude(self, state: StageState) -> dict[str, Any]:
        """ω by the name of the block."""
        names = self._method.adapter.block_names
        return {STAGE: dict(zip(names, state["weights"].tolist(), strict=True))}
