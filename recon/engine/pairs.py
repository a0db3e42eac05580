"""Joint histograms of what leaves two neighbouring blocks, while the teacher stands before them."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from recon.calibration import ranks
from recon.calibration.dependency import joint_histogram, rounding_points, soft_assignment
from recon.models.capabilities import SeesPictures

if TYPE_CHECKING:
    from recon.engine.reconstruction import Reconstruction

ELEMENTS = 2**22
"""Values of a block's output that enter its histogram, at most, over all samples."""


def pair_histogram(
    module: "Reconstruction", levels: int, power: float, *, literal: bool = False
) -> Tensor:
    """Tables of the pair that was recorded last, with its inner target, over all processes.

    Args:
        module: Whose streams they are.
        levels: Rounding points of each block's output.
        power: Of the distance that their range minimises.
        literal: Equation 5 of Q-VLM as printed.

    Returns:
        Float64 [2, levels, levels], of a picture's tokens and of all others.
    """
    first, second = (_some_tokens(module, depth) for depth in (1, 2))
    points = [rounding_points(list(t.values()), levels, power) for t in (first, second)]
    tables = torch.zeros(2, levels, levels, dtype=torch.float64, device=module.run_device)
    for sample, tokens in first.items():
        shares = [
            soft_assignment(values, *place, levels, literal=literal)
            for values, place in zip((tokens, second[sample]), points, strict=True)
        ]
        image = _image_tokens(module, sample, tokens)
        for kind, chosen in enumerate((image, ~image)):
            tables[kind] += joint_histogram(*(share[chosen] for share in shares))
    return ranks.total(tables)


def _some_tokens(module: "Reconstruction", depth: int) -> dict[int, Tensor]:
    """Evenly spaced tokens of each sample behind a block of the pair, [tokens, channels]."""
    found = {}
    for sample in module.frontier.calibration:
        tokens = module.frontier.target(sample, depth).flatten(0, 1)
        found[sample] = tokens[_spaced(module, *tokens.shape)]
    return found


def _image_tokens(module: "Reconstruction", sample: int, tokens: Tensor) -> Tensor:
    """Which of `tokens`, as `_some_tokens` gives them, belong to a picture; bool [tokens]."""
    if not isinstance(module.adapter, SeesPictures):
        return torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
    mask = module.adapter.image_tokens(module.frontier.sample(sample)).flatten()
    return mask[_spaced(module, len(mask), tokens.shape[1])].to(tokens.device)


def _spaced(module: "Reconstruction", tokens: int, channels: int) -> Tensor:
    most = max(1, ELEMENTS // (module.sample_count * channels))
    return torch.linspace(0, tokens - 1, min(tokens, most)).long()
