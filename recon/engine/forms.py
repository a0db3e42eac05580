"""Where the forms of a network stand while an evaluation takes turns between them."""

import torch
from torch import nn

from recon.engine.footprint import sampling_bytes
from recon.layers.quant_linear import QuantLinear
from recon.models.adapter import ModelAdapter

FORMS = 3
"""Full precision, round-to-nearest and quantised: as many whole networks."""
SHARE = 0.6
"""Of an accelerator's memory that the forms may take together, with all that samples beside them.
What a call of the network and a VAE compute needs the rest."""


def crowded(adapter: ModelAdapter, device: torch.device) -> bool:
    """Whether the forms would take more of an accelerator than their share; never of a CPU."""
    if device.type != "cuda":
        return False
    network, beside, _ = sampling_bytes(adapter, device)
    held = FORMS * network + beside
    return held > SHARE * torch.cuda.get_device_properties(device).total_memory


def carry(network: nn.Module, device: torch.device | str) -> None:
    """Moves a network, quantised or not, with what its quantised layers hold outside buffers.

    No number changes on the way, so that what a form makes does not depend on where it waited.
    """
    network.to(device)
    for part in network.modules():
        if isinstance(part, QuantLinear):
            part.carry_kept(device)
