"""What a compiled step computes a second time in its backward pass instead of keeping it."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def recomputed(quantizer: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
    """Result of `quantizer`; in a compiled step nothing inside it is kept for the backward pass.

    Left to itself, the compiler keeps quotient and masks of each weight and input, and writing
    and reading them costs more than the arithmetic, which is fused with its neighbours when done
    again. Eagerly, doing it again would cost more than keeping; without gradients nothing is kept.

    Args:
        quantizer: Draws no random numbers and changes nothing outside.
        inputs: The only tensor that it reads, besides parameters and buffers.
    """
    if not (torch.compiler.is_compiling() and torch.is_grad_enabled()):
        return quantizer(inputs)
    result: Tensor = checkpoint(quantizer, inputs, use_reentrant=False, preserve_rng_state=False)
    return result
