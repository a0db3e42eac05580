"""How much more the answer depends on a token of text than on one of a picture, block by block."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from recon.calibration import ranks
from recon.engine import walk
from recon.engine.unit import Unit
from recon.engine.vision import has_pictures
from recon.losses.answers import answer_cross_entropy
from recon.models.capabilities import SeesPictures

if TYPE_CHECKING:
    from recon.engine.reconstruction import Reconstruction


def image_weights(module: "Reconstruction") -> Tensor:
    """Mean |gradient| of a picture's tokens over that of all others behind each block, [blocks].

    The gradient is that of the answer's cross-entropy in the full-precision network, over the
    calibration samples with pictures of all processes; 1 where nothing depends on the text. Holds
    the whole network.

    Source: MBQ (arXiv 2412.19509), the weights of its reconstruction loss.
    """
    adapter = module.adapter
    assert isinstance(adapter, SeesPictures)
    blocks = walk.blocks_of(module, Unit("network", adapter.block_names))
    # Sum and number of values of pictures, then of all others.
    sums = torch.zeros(len(blocks), 4, dtype=torch.float64, device=module.run_device)
    for index in module.frontier.calibration:
        sample = module.frontier.sample(index)
        if not has_pictures(adapter, sample):
            continue
        state, hidden = module.embed(sample), []
        with torch.enable_grad():
            for name in adapter.streamed:
                state[name] = state[name].detach().requires_grad_(True)
            for block in blocks:
                state = adapter.forward_block(block, state)
                hidden.append(adapter.tokens(state))
            logits = adapter.output(sample, state, module.run_device)
            gradients = torch.autograd.grad(answer_cross_entropy(logits, sample["labels"]), hidden)
        image = adapter.image_tokens(sample).to(module.run_device)
        for row, gradient in zip(sums, gradients, strict=True):
            for kind, chosen in enumerate((image, ~image)):
                values = gradient[chosen].abs().float()
                row[2 * kind] += values.sum()
                row[2 * kind + 1] += values.numel()
    ranks.total(sums)
    pictures, others = (sums[:, 2 * kind] / sums[:, 2 * kind + 1] for kind in (0, 1))
    return torch.where(others > 0, pictures / others, 1.0).float()
