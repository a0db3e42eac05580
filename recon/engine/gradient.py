"""One optimizer step's gradient, the same bit for bit for any number of processes."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from recon.calibration import ranks
from recon.errors import NumericsError

SMALLER = 2.0**5
"""What `scaled_gradient` divides its scale by where something overflows."""


@dataclass(frozen=True)
class Step:
    """A sum (or mean) over samples, in float64."""

    gradient: Tensor
    """Of all parameters, in one vector."""
    terms: dict[str, Tensor]
    """Of the loss, scalars."""

    @property
    def loss(self) -> Tensor:
        """Sum of the terms, float32."""
        return torch.stack(list(self.terms.values())).sum().float()

    def add(self, other: "Step") -> "Step":
        """Adds another sample's, in place where it is large."""
        terms = {name: value + other.terms[name] for name, value in self.terms.items()}
        return Step(self.gradient.add_(other.gradient), terms)

    def with_terms(self, other: "Step") -> "Step":
        """Adds terms of other names."""
        return Step(self.gradient.add_(other.gradient), {**self.terms, **other.terms})


def added(terms: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Sum of each term over samples."""
    first, *others = terms
    return {name: sum((o[name] for o in others), start=value) for name, value in first.items()}


def loss_scale(dtype: torch.dtype) -> float:
    """What a loss is multiplied by before it is differentiated through a network of `dtype`.

    The derivative of a mean over millions of numbers is zero in float16, whose smallest number is
    6e-8. A power of two changes no digit, and other types need none.
    """
    return 2.0**20 if dtype == torch.float16 else 1.0


def flat_gradient(
    terms: Mapping[str, Tensor], parameters: Sequence[Tensor], scale: float = 1.0
) -> Step:
    """Gradient of the sum of `terms`, times `scale` on its way; frees their graph."""
    loss = torch.stack(list(terms.values())).sum()
    gradients = torch.autograd.grad(loss * scale, parameters, materialize_grads=True)
    flat = torch.cat([gradient.flatten() for gradient in gradients]).double().div_(scale)
    return Step(flat, {name: term.detach().double() for name, term in terms.items()})


def scaled_gradient(
    terms: Callable[[], Mapping[str, Tensor]], parameters: Sequence[Tensor], dtype: torch.dtype
) -> Step:
    """Gradient of the sum of `terms()`, computed through a network of `dtype`.

    Where something overflows, all is computed again with a smaller scale. Each step begins with the
    same one, so that a resumed run does what an uninterrupted one does.
    """
    scale = loss_scale(dtype)
    step = flat_gradient(terms(), parameters, scale)
    # Only where there is a scale: asking costs a device synchronisation.
    while scale > 1 and not bool(step.gradient.isfinite().all()):
        scale = max(scale / SMALLER, 1.0)
        step = flat_gradient(terms(), parameters, scale)
    return step


def averaged(total: Step, batch: int) -> Step:
    """Mean over the global batch, from this process's sum over its share."""
    values = torch.stack(list(total.terms.values()))
    vector = ranks.total(torch.cat([total.gradient, values])).div_(batch)
    count = len(total.terms)
    terms = dict(zip(total.terms, vector[-count:].unbind(), strict=True))
    return Step(vector[:-count], terms)


def hand_out(gradient: Tensor, parameters: Sequence[Tensor]) -> None:
    """Sets the `grad` of every parameter from one vector."""
    offset = 0
    for parameter in parameters:
        part = gradient[offset : offset + parameter.numel()]
        parameter.grad = part.view_as(parameter).to(parameter.dtype)
        offset += parameter.numel()


def refuse_nan(step: Step, place: str, number: int) -> None:
    """Does nothing for a finite step.

    Raises:
        NumericsError: Loss or gradient is NaN or Inf.
    """
    if not (step.gradient.isfinite().all() and step.loss.isfinite()):
        raise NumericsError(
            f"The loss or a gradient of {place} is NaN or Inf at step {number}. The last "
            "checkpoint is good: lower the learning rates and start anew, or look at the inputs."
        )
