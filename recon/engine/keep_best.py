"""Whether what a unit learned is kept: the best version by its hard error, or none."""

from collections.abc import Callable, Mapping, Sequence

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from recon.calibration.frontier import Frontier
from recon.engine.prefixes import Weigh, unit_error
from recon.engine.unit import OpenUnit, StageState
from recon.quantizers.affine import dequantize


@torch.no_grad()
def assign(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Writes values into parameters."""
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


def best_so_far(parameters: Sequence[Tensor]) -> dict[str, Tensor]:
    """State in which `remember` keeps the parameters of the smallest loss."""
    copies = {f"best_{i}": p.detach().clone() for i, p in enumerate(parameters)}
    return {"best_loss": torch.tensor(torch.inf), **copies}


@torch.no_grad()
def remember(state: StageState, parameters: Sequence[Tensor], loss: Tensor) -> None:
    """Keeps the parameters if their loss is the smallest so far; asks the device for nothing."""
    better = loss < state["best_loss"]
    for best, parameter in zip(remembered(state, len(parameters)), parameters, strict=True):
        torch.where(better, parameter, best, out=best)
    state["best_loss"].copy_(torch.minimum(loss, state["best_loss"]))


def remembered(state: StageState, count: int) -> list[Tensor]:
    """The parameters of the smallest loss."""
    return [state[f"best_{i}"] for i in range(count)]


@torch.no_grad()
def hard_error(frontier: Frontier, unit: OpenUnit, stream: str, weigh: Weigh) -> float:
    """Relative error of the open unit's output with each weight as it would be closed now."""
    for layer in unit.layers.values():
        assert layer.rounding is not None
        codes, scale = layer.rounding.close(layer.transformed_weight())
        assert layer.teacher_weight is not None
        weight = dequantize(codes, scale, layer.weight_spec)
        layer.resident_weight = weight.to(layer.teacher_weight.dtype)
    error = unit_error(frontier, unit.student_blocks, stream, weigh)
    for layer in unit.layers.values():
        layer.resident_weight = None
    return error


def take_best(
    parameters: Sequence[Tensor],
    versions: Mapping[str, Sequence[Tensor]],
    error: Callable[[], float],
) -> float:
    """Tries each version of the parameters, leaves the best in place and returns its error."""
    errors = {}
    for name, values in versions.items():
        assign(parameters, values)
        errors[name] = error()
    best = min(errors, key=errors.__getitem__)
    assign(parameters, versions[best])
    return errors[best]


def note(unit: OpenUnit, before: float, after: float, what: str) -> None:
    """Among the unit's results: the block error that `what` led to, and whether it is kept."""
    if after > before:
        rank_zero_info(
            f"Unit {unit.unit.name}: {what} left the block error at {after:.3e}, above the "
            f"{before:.3e} of the search; the search is kept."
        )
    unit.results |= {
        "block_error_learned": after,
        "block_error_final": min(after, before),
        "rounding_accepted": float(after <= before),
    }
