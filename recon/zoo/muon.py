"""Muon in single precision, all matrices of one shape at once.

`torch.optim.Muon` orthogonalises in bfloat16, one matrix at a time, which on a CPU without bfloat16
arithmetic takes several times as long as the training step itself.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

_QUINTIC = (3.4445, -4.7750, 2.0315)
"""Coefficients of the iteration, as in the reference."""


def orthogonalised(matrices: Tensor, iterations: int = 5) -> Tensor:
    """Matrices [count, rows, columns] with all singular values moved near one.

    Source: https://kellerjordan.github.io/posts/muon, Newton-Schulz iteration.
    """
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / x.flatten(1).norm(dim=1).clamp_min(1e-7)[:, None, None]
    first, second, third = _QUINTIC
    for _ in range(iterations):
        gram = x @ x.mT
        x = first * x + (second * gram + third * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum whose every update is an orthogonal matrix, with decoupled weight decay.

    Args:
        parameters: Matrices only.
        lr: Learning rate; updates are scaled to the root mean square of AdamW's, 0.2, so that
            AdamW's rates fit (Moonlight, https://arxiv.org/abs/2502.16982, section 2.2).
        momentum: Nesterov momentum in [0, 1).
        weight_decay: Decoupled, per unit of learning rate.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.01,
    ) -> None:
        by_shape: dict[tuple[int, ...], list[Tensor]] = {}
        for parameter in parameters:
            by_shape.setdefault(tuple(parameter.shape), []).append(parameter)
        groups = [{"params": same} for same in by_shape.values()]
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every matrix that has a gradient."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            gradient = torch.stack([p.grad for p in parameters])
            state = self.state[parameters[0]]  # one buffer for all matrices of this shape
            average = state.setdefault("momentum", torch.zeros_like(gradient))
            average.lerp_(gradient, 1 - group["momentum"])
            update = orthogonalised(gradient.lerp(average, group["momentum"]))
            scale = 0.2 * max(gradient.shape[1:]) ** 0.5 * group["lr"]
            for parameter, change in zip(parameters, update, strict=True):
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.sub_(change, alpha=scale)
