"""Loads an export through its public loader and runs it: `python -P fresh.py REQUEST.json`.

Started by its path in a process of its own, and it imports nothing of recon: what it loads, anyone
can. A request names `library`, `class`, `folder`, `dtype`, `threads`, `layers` (whose numbers are
told), and the files `inputs`, `outputs`, `facts`. The library `recon` stands for `recon.load`, the
loader of the native format.
"""

import hashlib
import importlib
import json
import resource
import sys
import time
from collections import Counter
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

Call = dict[str, Any]
"""Arguments by name: tensors, or tuples of tensors."""

Numbers = dict[str, str]
"""What a layer computes with: the grid of its input in words, digests of its tensors."""


def flattened(calls: list[Call]) -> dict[str, Tensor]:
    """Calls as one dictionary: `0.timestep`, and `0.image_rotary_emb.1` inside a tuple."""
    flat: dict[str, Tensor] = {}
    for number, call in enumerate(calls):
        for name, value in call.items():
            if isinstance(value, tuple):
                flat |= {f"{number}.{name}.{at}": part for at, part in enumerate(value)}
            else:
                flat[f"{number}.{name}"] = value
    return {name: tensor.contiguous() for name, tensor in flat.items()}


def unflattened(flat: dict[str, Tensor], dtype: torch.dtype) -> list[Call]:
    """The inverse of `flattened`; floating tensors in `dtype`, those inside tuples as they are."""
    calls: dict[int, Call] = {}
    for key in sorted(flat):
        number, name, *position = key.split(".")
        call, tensor = calls.setdefault(int(number), {}), flat[key]
        if position:
            call[name] = (*call.get(name, ()), tensor)
        else:
            call[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    return [calls[number] for number in sorted(calls)]


@torch.no_grad()
def outputs(network: nn.Module, calls: list[Call]) -> list[Tensor]:
    """First output of the network for each call."""
    return [network(**call, return_dict=False)[0] for call in calls]


def is_quantized(module: nn.Module) -> bool:
    """Whether the weight of a loaded layer is integers, in any of the formats."""
    weight = _weight(module)
    return (
        type(module).__name__ == "QuantLinear"
        or getattr(module, "quantization_scheme", None) is not None
        or hasattr(module, "qweight")
        or (weight is not None and type(weight).__module__.startswith("torchao"))
    )


def _weight(module: nn.Module) -> Tensor | None:
    # Not by attribute: some layers make a weight up when asked for it.
    return dict(module.named_parameters(recurse=False)).get("weight")


def numbers(layer: nn.Module) -> Numbers:
    """What a layer computes with, as its own library reads it: equal if every number is.

    The weight is de-quantised, so that it does not matter how codes are packed.
    """
    if hasattr(layer, "qweight"):
        return _told(_of_auto_round(layer))
    if type(layer).__name__ == "QuantLinear":  # auto-round has one of this name, too
        return _of_recon(layer)
    scheme, weight = getattr(layer, "quantization_scheme", None), _weight(layer)
    assert weight is not None
    if scheme is not None:
        return _of_compressed_tensors(layer, scheme.input_activations)
    if type(weight).__module__.startswith("torchao"):
        return _of_torchao(weight)
    return _told(weight)


def _told(
    weight: Tensor,
    grid: str = "none",
    step: Tensor | None = None,
    zero_point: Tensor | None = None,
    factors: Tensor | None = None,
) -> Numbers:
    """Numbers of a layer; zero-points are those of signed codes, and 0 where there is none."""
    if step is not None and zero_point is None:
        zero_point = torch.zeros_like(step)
    given = {
        "weight": weight,
        "input step size": step,
        "input zero-point": zero_point,
        "factors of input channels": factors,
    }
    said = {name: _digest(tensor) for name, tensor in given.items() if tensor is not None}
    return {"grid of the input": grid, **said}


def _digest(tensor: Tensor) -> str:
    # float32 holds every type that is stored; adding zero makes -0.0 and 0.0 the same bytes.
    values = tensor.detach().float().flatten() + 0.0
    return hashlib.sha256(values.numpy().tobytes()).hexdigest()


def _grid(num_bits: int, strategy: str, symmetric: bool) -> str:
    return f"{num_bits} bits, {strategy}, {'symmetric' if symmetric else 'asymmetric'}"


def _of_recon(layer: Any) -> Numbers:
    spec, transform, weight = layer.activation_spec, layer.transform, layer.quantized_weight()
    factors = None if transform is None else transform.channel_scale
    if spec is None:
        return _told(weight, factors=factors)
    grid = _grid(spec.num_bits, spec.strategy, spec.symmetric)
    fixed = None if transform is None else transform.static
    if fixed is None:
        return _told(weight, grid, factors=factors)
    lowest = 0 if spec.symmetric else 1 << (spec.num_bits - 1)
    return _told(weight, grid, fixed.step, fixed.zero_point - lowest, factors)


def _of_torchao(weight: Any) -> Numbers:
    values, kwargs = weight.dequantize(), getattr(weight, "act_quant_kwargs", None)
    factors = getattr(weight, "act_pre_scale", None)
    if kwargs is None:
        return _told(values, factors=factors)
    shared = {"PerRow": "token", "PerTensor": "tensor"}[type(kwargs.granularity).__name__]
    grid = _grid(8, shared, kwargs.mapping_type.name == "SYMMETRIC")
    return _told(values, grid, weight.act_quant_scale, weight.act_quant_zero_point, factors)


def _of_compressed_tensors(layer: Any, inputs: Any) -> Numbers:
    # The first call de-quantised the weight.
    if inputs is None:
        return _told(layer.weight)
    grid = _grid(inputs.num_bits, inputs.strategy, inputs.symmetric)
    step, zero_point = (getattr(layer, f"input_{key}", None) for key in ("scale", "zero_point"))
    return _told(layer.weight, grid, step, zero_point)


@torch.no_grad()
def _of_auto_round(layer: Any) -> Tensor:
    """The weight, which the layer shows only in products: that with the identity is exact."""
    bias, layer.bias = layer.bias, None
    shown: Tensor = layer(torch.eye(layer.infeatures, dtype=layer.scales.dtype)).T
    layer.bias = bias
    return shown


def _kind(module: nn.Module) -> str:
    weight = _weight(module)
    inside = "" if weight is None else f" of {type(weight).__name__}"
    return f"{type(module).__module__}.{type(module).__qualname__}{inside}"


def load(request: dict[str, Any]) -> nn.Module:
    """The network that a request names, in eval mode."""
    if request["library"] == "recon":
        # recon.load in the floating type asked for.
        from recon.engine.native import read_native

        return read_native(request["folder"], request["dtype"]).network()
    public = getattr(importlib.import_module(request["library"]), request["class"])
    word = "torch_dtype" if request["library"] == "diffusers" else "dtype"
    given = {word: getattr(torch, request["dtype"])}
    network: nn.Module = public.from_pretrained(request["folder"], **given)
    return network.eval()


def moved(network: nn.Module) -> nn.Module:
    """The network with its plain tensors in fresh memory, in place.

    Some loaders leave them where they lie in the mapped file, at any address; matrix products add
    up in an order that depends on it, and differ in the last bit.
    """
    for module in network.modules():
        for name, value in module.named_parameters(recurse=False):
            if type(value) is nn.Parameter:
                copied = nn.Parameter(value.detach().clone(), requires_grad=False)
                module.register_parameter(name, copied)
    return network


def answer(path: str) -> None:
    """Loads and runs what a request names; writes outputs and what was seen of the network."""
    with open(path) as file:
        request = json.load(file)
    torch.set_num_threads(request["threads"])
    started = time.monotonic()
    network = moved(load(request))
    loaded = time.monotonic()
    calls = unflattened(load_file(request["inputs"]), getattr(torch, request["dtype"]))
    found = outputs(network, calls)
    ran = time.monotonic()
    save_file({str(i): t.contiguous() for i, t in enumerate(found)}, request["outputs"])
    quantized = {name: _kind(m) for name, m in network.named_modules() if is_quantized(m)}
    facts = {
        "class": f"{type(network).__module__}.{type(network).__qualname__}",
        "quantized": sorted(quantized),
        "kinds": dict(Counter(quantized.values())),
        "numbers": {name: numbers(network.get_submodule(name)) for name in request["layers"]},
        "recon_imported": "recon" in sys.modules,
        "seconds": {"load": loaded - started, "run": ran - loaded},
        "peak_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    }
    with open(request["facts"], "w") as file:
        json.dump(facts, file)


if __name__ == "__main__":
    answer(sys.argv[1])
