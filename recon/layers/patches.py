"""Convolutions that are linear layers over patches: those whose kernel is their stride."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from recon.errors import CapabilityMissing


def as_linear(layer: nn.Module) -> nn.Linear:
    """The layer as an nn.Linear on the same weight: itself, or a convolution over its patches.

    Raises:
        CapabilityMissing: It is neither a Linear nor a convolution over patches side by side.
    """
    if isinstance(layer, nn.Linear):
        return layer
    if not isinstance(layer, nn.Conv2d):
        raise CapabilityMissing(
            f"A {type(layer).__name__} cannot be quantised as a Linear; nn.Linear and nn.Conv2d "
            "over patches can. Leave it out of the adapter's groups."
        )
    side_by_side = layer.kernel_size == layer.stride and layer.padding in ((0, 0), "valid")
    if not side_by_side or layer.dilation != (1, 1) or layer.groups != 1:
        raise CapabilityMissing(
            f"{layer} is no Linear over patches: kernel and stride must be equal, without padding, "
            "dilation or groups. Leave it out of the adapter's groups."
        )
    weight = layer.weight.detach().flatten(1)
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=layer.bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if layer.bias is not None:
        linear.bias = nn.Parameter(layer.bias.detach(), requires_grad=False)
    return linear


def patches(images: Tensor, kernel: tuple[int, int]) -> Tensor:
    """Images [batch, channels, height, width] as tokens [batch, patches, channels of a patch].

    Patches go row by row; what they hold is in the order of a convolution's weight, flattened.
    """
    return functional.unfold(images, kernel, stride=kernel).transpose(1, 2)


def image_of(tokens: Tensor, rows: int) -> Tensor:
    """Tokens [batch, patches, channels], row by row, as images [batch, channels, rows, columns]."""
    return torch.unflatten(tokens.transpose(1, 2), 2, (rows, -1))
