"""What came out of a run, in numbers."""

import resource
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from recon.calibration import ranks
from recon.engine.own_encoders import outputs_behind_own_encoders
from recon.layers.quant_linear import QuantLinear

if TYPE_CHECKING:
    from recon.engine.reconstruction import Reconstruction


@torch.no_grad()
def network_error(module: "Reconstruction") -> dict[str, float]:
    """Relative squared error of the network's output on the held-out samples.

    Returns:
        `round_to_nearest` and `reconstructed`, both ‖quantised − teacher‖² / ‖teacher‖² summed
        over samples, with the same bits and the same layers quantised.
    """
    frontier = module.frontier
    final = frontier.final if module.vision is None else outputs_behind_own_encoders(module)
    sums = torch.zeros(3, dtype=torch.float64)
    for index in frontier.held_out:
        teacher = final("teacher", index).double()
        student = final("student", index).double()
        nearest = final("nearest", index).double()
        sums += torch.stack(
            [
                (nearest - teacher).square().sum(),
                (student - teacher).square().sum(),
                teacher.square().sum(),
            ]
        ).cpu()
    nearest_error, student_error, power = ranks.total(sums.to(frontier.device)).tolist()
    return {
        "round_to_nearest": nearest_error / power,
        "reconstructed": student_error / power,
    }


def linear_bytes(layers: Iterable[nn.Module]) -> dict[str, int]:
    """Bytes of quantised linears: weights at 16 bits, and everything that replaces them.

    Counted are codes, step sizes, transforms (once per group), clips, and the steps of quantised
    attention products; biases are in neither.
    """
    full, seen, quantized = 0, set[int](), 0
    for layer in layers:
        if isinstance(layer, QuantLinear):
            full += 2 * layer.in_features * layer.out_features
        for tensor in layer.state_dict(keep_vars=True).values():
            if id(tensor) not in seen:
                seen.add(id(tensor))
                quantized += tensor.nbytes
    return {"full_precision": full, "quantized": quantized}


def host_peak() -> int:
    """Bytes that this process had in memory at most.

    Children do not count: until one runs its own program the system takes all that it shares with
    its parent for the child's, so that W&B's call of git would double the number.
    """
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def summary(module: "Reconstruction", total_seconds: float) -> dict[str, Any]:
    """The content of `summary.json`."""
    samples = len(module.frontier.calibration) + len(module.frontier.held_out)
    forwards = module.frontier.forwards
    device = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return {
        "method": type(module).__name__,
        "teacher": str(module.adapter.folder),
        "bits": {
            "weight": module.weight.num_bits,
            "activation": module.activation.num_bits if module.activation else 16,
        },
        "units": len(module.units),
        "blocks": sum(len(unit.blocks) for unit in module.units),
        "block_forwards_per_sample": (forwards.teacher + forwards.student) / max(samples, 1),
        "seconds": {**module.seconds, "total": total_seconds},
        "peak_memory_bytes": {"host": host_peak(), "device": device},
        "size_bytes": linear_bytes(module.quantizers.values()),
        "error": module.final_error,
    }
