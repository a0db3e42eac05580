"""torchao tensors, for networks of diffusers: integer matrix products of learned codes.

Source: torchao 0.18 (Int8Tensor, IntxUnpackedToInt8Tensor) as diffusers 0.42 loads it; codes, step
sizes and ranges are put into its tensors as they are.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from recon.errors import ExportError
from recon.export import layer as layers_of
from recon.export.finished import Finished
from recon.export.format import ROUNDING, Format, Written, public_folder
from recon.export.layer import (
    channel_scale,
    codes,
    group_size,
    obstacles,
    static_range,
    step_sizes,
)
from recon.export.public import plain_linear, public_network, write_public
from recon.layers.quant_linear import QuantLinear

INPUT_BITS = 8


class TorchAo(Format):
    """Codes of every width in 8-bit storage; inputs of 8 bits meet them as integers."""

    name: ClassVar = "torchao"
    libraries: ClassVar = ("diffusers",)
    # diffusers reads quantised files through accelerate only.
    packages: ClassVar = {"torchao": "torchao", "accelerate": "accelerate"}

    def misfits(self, finished: Finished) -> list[str]:
        """Rotations, clips, inputs of other than 8 bits, groups where inputs are integers."""
        return obstacles(
            finished.layers,
            layers_of.rotated,
            layers_of.clipped,
            layers_of.otherwise_ranged,
            layers_of.oddly_shared,
            layers_of.shifted,
            _other_width,
            _grouped,
        )

    def stored_bits(self, num_bits: int) -> int:
        """8, whatever the bits."""
        return 8

    def write(self, finished: Finished, folder: Path) -> Written:
        """Weights as tensors of torchao, in its own safetensors layout."""
        layers = finished.layers
        axes = _input_axes(finished)
        tensors = {name: _tensor(layer, axes[name]) for name, layer in layers.items()}
        network = public_network(finished, layers)
        for name, layer in layers.items():
            network.set_submodule(name, plain_linear(tensors[name], layer.bias))
        rest = finished.native.unquantized()
        state, header = _flattened({**rest, **{f"{n}.weight": t for n, t in tensors.items()}})
        target = public_folder(finished, folder)
        write_public(finished, target, state, _config(finished), header)
        integer = any(layer.activation_spec is not None for layer in layers.values())
        pre_scaled = any(channel_scale(layer) is not None for layer in layers.values())
        return Written(
            network=network,
            library=finished.library,
            folder=target,
            linear_bytes=sum(t.nbytes for name, t in state.items() if name not in rest),
            runs_as=tuple(dict.fromkeys(_runs_as(layer) for layer in layers.values())),
            run_tolerance=ROUNDING if integer or pre_scaled else 0.0,
            # It multiplies by 1 / s where we divide by s, so that at ties a code may be the other
            # one; and a token's largest value is a tie, 127.5 (seen: a tenth of tokens differ).
            rounds_otherwise=integer,
            # diffusers takes this one for the network, and float32 for the rest, unless told.
            load_dtype="bfloat16",
        )


def _other_width(layer: QuantLinear) -> str | None:
    spec = layer.activation_spec
    if spec is None or spec.num_bits == INPUT_BITS:
        return None
    return f"quantises its input to {spec.num_bits} bits; integer products take {INPUT_BITS}"


def _grouped(layer: QuantLinear) -> str | None:
    if layer.activation_spec is None or layer.weight_spec.strategy != "group":
        return None
    return (
        f"has a step size for each {layer.weight_spec.group_size} inputs and quantised inputs; an "
        "integer product takes one step size per row (weight.strategy channel)"
    )


def _input_axes(finished: Finished) -> dict[str, int]:
    """How many axes the input of each quantised Linear has."""
    axes: dict[str, int] = {}
    layers = finished.layers
    network = public_network(finished, layers)

    def remember(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if axes.setdefault(name, inputs[0].ndim) != inputs[0].ndim:
                raise ExportError(
                    f"{name} is called with inputs of {axes[name]} and of {inputs[0].ndim} axes; "
                    "torchao's fixed ranges belong to one number of axes. Use --format native."
                )

        return hook

    for name, layer in layers.items():
        layer.register_forward_pre_hook(remember(name))
    call = finished.native.adapter.call_arguments(finished.samples[0], "cpu")
    with torch.no_grad():
        network(**call)
    return axes


def _tensor(layer: QuantLinear, axes: int) -> Tensor:
    from torchao.quantization import Int8Tensor, IntxUnpackedToInt8Tensor

    scale, pre_scale = step_sizes(layer), channel_scale(layer)
    block = [1, group_size(layer)]
    if layer.activation_spec is None and pre_scale is None:
        return IntxUnpackedToInt8Tensor(
            qdata=codes(layer),
            scale=scale,
            zero_point=torch.zeros_like(scale, dtype=torch.int8),
            target_dtype=getattr(torch, f"int{layer.weight_spec.num_bits}"),
            block_size=block,
            dtype=torch.float32,
            activation_quantization=None,
        )
    return Int8Tensor(
        codes(layer),
        scale,
        block,
        torch.float32,
        act_pre_scale=pre_scale,
        **_input_arguments(layer, axes),
    )


def _input_arguments(layer: QuantLinear, axes: int) -> dict[str, Any]:
    """How the input is quantised, as arguments of Int8Tensor."""
    from torchao.quantization import MappingType, PerRow, PerTensor
    from torchao.quantization.quantize_.workflows import QuantizeTensorToInt8Kwargs

    spec, fixed = layer.activation_spec, static_range(layer)
    if spec is None:
        return {}
    if fixed is None:
        return {"act_quant_kwargs": QuantizeTensorToInt8Kwargs(granularity=PerRow())}
    shape = (1,) * axes
    if spec.symmetric:
        mapping, zero_point = MappingType.SYMMETRIC, None
    else:
        # Codes from 0 to 255 there lie from -128 to 127 here.
        shifted = fixed.zero_point - (1 << (INPUT_BITS - 1))
        mapping, zero_point = MappingType.ASYMMETRIC, shifted.to(torch.int8).reshape(shape)
    return {
        "act_quant_kwargs": QuantizeTensorToInt8Kwargs(
            granularity=PerTensor(), mapping_type=mapping
        ),
        "act_quant_scale": fixed.step.detach().float().reshape(shape),
        "act_quant_zero_point": zero_point,
    }


def _flattened(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    tensors, header = flatten_tensor_state_dict(dict(state))
    return tensors, header


def _config(finished: Finished) -> dict[str, Any]:
    """`quantization_config` of config.json; the type in it is a label, each tensor says its own.

    Raises:
        ExportError: diffusers would take a quantised layer for one to be left alone.
    """
    from diffusers import TorchAoConfig
    from torchao.quantization import Int8WeightOnlyConfig

    quantized = finished.native.manifest["layers"]
    left = [name for name in finished.linears if name not in quantized]
    # diffusers looks for "NAME." anywhere in the name of a tensor.
    caught = [(n, q) for n in left for q in quantized if f"{n}." in f"{q}.weight"]
    if caught:
        raise ExportError(
            f"{caught[0][0]} is left in full precision, and diffusers would take {caught[0][1]} "
            "for it: torchao files tell layers apart by parts of their names. Use --format native."
        )
    found: dict[str, Any] = TorchAoConfig(Int8WeightOnlyConfig(), left).to_dict()
    return found


def _runs_as(layer: QuantLinear) -> str:
    width, spec = layer.weight_spec.num_bits, layer.activation_spec
    stored = f"W{width} stored in 8 bits"
    if spec is None:
        return f"{stored}, A16: weights are de-quantised at every call, on any hardware"
    ranges = "per token" if spec.strategy == "token" else "on fixed ranges"
    return f"{stored}, A{spec.num_bits} {ranges}: int8 matrix products on a CPU; not run on CUDA"
