"""Outputs of the teacher and of round-to-nearest, each behind its own visual encoder.

The streams of a run start behind the encoder that the run made: what is done to blocks is judged
on what they will see. A whole network is judged beside whole networks.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from recon.engine import walk
from recon.engine.assembly import nearest_layers
from recon.engine.vision import VisionNetwork
from recon.models.capabilities import SeesPictures

if TYPE_CHECKING:
    from recon.engine.reconstruction import Reconstruction


@torch.no_grad()
def outputs_behind_own_encoders(module: "Reconstruction") -> Callable[[str, int], Tensor]:
    """As `Frontier.final`, for the held-out samples; computed block by block."""
    frontier, adapter, device = module.frontier, module.adapter, module.run_device
    assert isinstance(adapter, SeesPictures)
    teacher = VisionNetwork(adapter, device)
    groups = teacher.groups() if module.quantize_vision else []
    activation = {group.name: module.vision_activation for group in groups}
    rounded = nearest_layers(groups, module.weight, activation)
    encoders = {"teacher": teacher, "nearest": VisionNetwork(adapter, device, rounded)}
    states = {
        (stream, index): encoder.embed(frontier.sample(index))
        for stream, encoder in encoders.items()
        for index in frontier.held_out
    }
    for unit in module.units:
        blocks = walk.blocks_of(module, unit)
        networks = {"teacher": blocks, "nearest": walk.nearest_blocks(module, unit, blocks)}
        for (stream, index), state in states.items():
            states[stream, index] = frontier.run(networks[stream], state)

    def final(stream: str, index: int) -> Tensor:
        if stream == "student":
            return frontier.final(stream, index)
        return adapter.output(frontier.sample(index), states[stream, index], device)

    return final
