"""Error of one call of the network at each sampling step: where a result is good, and where not.

A single number over steps hides what decides a sample: errors of the first steps grow through all
that follow, errors of the last do not, and a method may lower these and raise those.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from recon.engine.sampling import Form, pipeline
from recon.types import Sample

if TYPE_CHECKING:
    from recon.engine.reconstruction import Reconstruction

FORMS: tuple[Form, ...] = ("round_to_nearest", "quantized")


@torch.no_grad()
def squared_errors(module: "Reconstruction", prompt: str, seed: int) -> list[dict[str, float]]:
    """What each form of the network gets wrong along one full-precision sample.

    Every form sees what the teacher's own sampling puts into it, so errors do not add up from step
    to step.

    Returns:
        For each step its `timestep`, the `power` ‖teacher‖² of the network's output and, for each
        of FORMS, ‖form − teacher‖², all rows of a guided call together.
    """
    # Lightning sets the attribute, and declares it not.
    trainer: Any = module.trainer  # Lightning sets its datamodule, and declares it not
    data, device = trainer.datamodule, module.run_device
    teacher = pipeline(module, "full_precision", device)
    calls: list[Sample] = []

    def keep(step: int, sample: Sample) -> None:
        calls.append({name: tensor.clone() for name, tensor in sample.items()})

    teacher.trajectory(prompt, seed, data.steps, data.guidance, keep)
    given = [module.adapter.call_arguments(sample, device) for sample in calls]
    wanted = [_output(teacher.network, call) for call in given]
    errors: dict[Form, list[float]] = {}
    # Form by form: only the one asked for last is sure to stand on the device.
    for form in FORMS:
        network = pipeline(module, form, device).network
        errors[form] = [
            _squared(_output(network, call).double() - reference)
            for call, reference in zip(given, wanted, strict=True)
        ]
    return [
        {
            "timestep": float(sample["timestep"].flatten()[0]),
            "power": _squared(reference.double()),
            **{form: errors[form][step] for form in FORMS},
        }
        for step, (sample, reference) in enumerate(zip(calls, wanted, strict=True))
    ]


def relative_errors(found: Sequence[Sequence[dict[str, float]]]) -> list[dict[str, float]]:
    """Errors of each step over the power of the teacher's output, summed over samples.

    Args:
        found: What `squared_errors` gave for each of them; equally many steps.
    """
    result = []
    for rows in zip(*found, strict=True):
        power = sum(row["power"] for row in rows)
        errors: dict[str, float] = {f: sum(row[f] for row in rows) / power for f in FORMS}
        result.append({"timestep": rows[0]["timestep"], **errors})
    return result


def _output(network: torch.nn.Module, call: dict[str, Any]) -> Tensor:
    (output,) = network(**call, return_dict=False)
    assert isinstance(output, Tensor)
    return output


def _squared(tensor: Tensor) -> float:
    return float(tensor.square().sum())
