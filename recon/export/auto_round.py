"""auto-round's layout, for networks of diffusers: weights alone, in as many bits as they have.

Source: auto-round 0.16 (`auto_round:auto_gptq`), whose loader diffusers 0.42 calls.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from recon.export import layer as layers_of
from recon.export.finished import Finished
from recon.export.format import ROUNDING, Format, Written, public_folder
from recon.export.layer import channel_scale, codes, obstacles, step_sizes
from recon.export.public import floating_type, public_network, write_public
from recon.layers.quant_linear import QuantLinear
from recon.models.capabilities import FoldsScales
from recon.quantizers.packing import pack

MULTIPLE = 32
"""Inputs and outputs that its layers come in multiples of."""

TOLERANCES = {"float16": (2e-3, 5e-3), "bfloat16": (2e-2, 3e-2)}
"""Relative differences between loaded and in-memory layers, whose products are added up in another
order, and between half precision and float32. Loaded layers compute in these two types only."""


class AutoRound(Format):
    """Packed codes with half-precision step sizes; channel scales folded away where they can be."""

    name: ClassVar = "auto-round"
    libraries: ClassVar = ("diffusers",)
    packages: ClassVar = {"auto_round": "auto-round", "accelerate": "accelerate"}

    def misfits(self, finished: Finished) -> list[str]:
        """Quantised inputs, rotations, scales that nothing takes over, odd sizes."""
        layers = finished.layers
        scaled = {n: q for n, q in layers.items() if n not in _foldable(finished)}
        return [
            *obstacles(
                layers,
                _quantized_input,
                layers_of.rotated,
                layers_of.shifted,
                _odd_size,
                _tiny_steps,
            ),
            *obstacles(scaled, _scaled),
        ]

    def stored_bits(self, num_bits: int) -> int:
        """As many as it has."""
        return num_bits

    def as_loaded(
        self, finished: Finished, dtype: torch.dtype
    ) -> Iterator[tuple[str, QuantLinear]]:
        """Step sizes by way of float16, and channel scales in those of the layers before."""
        layers = finished.layers
        _fold(finished, public_network(finished, layers), layers)
        for name, layer in layers.items():
            assert layer.scale is not None
            layer.scale = layer.scale.half().to(dtype)
            yield name, layer

    def write(self, finished: Finished, folder: Path) -> Written:
        """Every quantised weight as qweight, qzeros and scales."""
        layers = finished.layers
        network = public_network(finished, layers)
        _fold(finished, network, layers)
        stored: dict[str, Tensor] = {}
        for name, layer in layers.items():
            stored |= {f"{name}.{key}": tensor for key, tensor in _tensors(layer).items()}
        target = public_folder(finished, folder)
        rest = _unquantized(finished, network, layers)
        write_public(finished, target, {**rest, **stored}, _config(finished))
        stored_in = floating_type(rest.values())
        dtype = torch.bfloat16 if stored_in == torch.bfloat16 else torch.float16
        word = str(dtype).removeprefix("torch.")
        width = next(iter(layers.values())).weight_spec.num_bits
        return Written(
            network=network,
            library=finished.library,
            folder=target,
            linear_bytes=sum(tensor.nbytes for tensor in stored.values()),
            runs_as=(
                f"W{width} stored in {width} bits, A16: auto-round's torch layers, weights "
                "de-quantised at every call, on any hardware; its CUDA kernels (Marlin, ExLlamaV2 "
                "by gptqmodel) were not run here",
            ),
            dtype=word,
            load_dtype=word,
            folding_tolerance=ROUNDING,
            file_tolerance=TOLERANCES[word][0],
            run_tolerance=TOLERANCES[word][1],
            notes=("Step sizes are stored in float16, and the network runs in half precision.",),
        )


def _quantized_input(layer: QuantLinear) -> str | None:
    if layer.activation_spec is None:
        return None
    return (
        f"quantises its input to {layer.activation_spec.num_bits} bits, which auto-round leaves "
        "alone"
    )


def _odd_size(layer: QuantLinear) -> str | None:
    if layer.in_features % MULTIPLE == 0 and layer.out_features % MULTIPLE == 0:
        return None
    return (
        f"has {layer.in_features} inputs and {layer.out_features} outputs; auto-round's layers "
        f"come in multiples of {MULTIPLE}"
    )


def _tiny_steps(layer: QuantLinear) -> str | None:
    scale = step_sizes(layer)
    if bool(((scale.half().float() - scale).abs() <= scale * 2**-11).all()):
        return None
    return (
        f"has step sizes from {float(scale.min()):.1e} to {float(scale.max()):.1e}, which float16 "
        "does not hold to 11 binary digits"
    )


def _scaled(layer: QuantLinear) -> str | None:
    if channel_scale(layer) is None:
        return None
    return "multiplies each channel of its input by a factor that no layer before it can take over"


# Folding channel scales


def _foldable(finished: Finished) -> set[str]:
    """Linears whose channel scale the layers before them can take over."""
    adapter = finished.native.adapter
    if not isinstance(adapter, FoldsScales):
        return set()
    return {
        f"{block}.{name}"
        for block in adapter.block_names
        for group in adapter.input_groups(block)
        if group.linears[0] in adapter.foldable(block)
        for name in group.linears
    }


def _fold(finished: Finished, network: nn.Module, layers: Mapping[str, QuantLinear]) -> None:
    """Moves every channel scale into the layers before it."""
    adapter = finished.native.adapter
    if not isinstance(adapter, FoldsScales):
        return
    for block in adapter.block_names:
        scales: dict[str, Tensor] = {}
        for name in adapter.foldable(block):
            layer = layers.get(f"{block}.{name}")
            scale = None if layer is None else channel_scale(layer)
            if scale is not None:
                scales[name] = scale
        adapter.fold_within_class(network.get_submodule(block), scales)
    for layer in layers.values():
        layer.transform = None


def _unquantized(
    finished: Finished, network: nn.Module, layers: Mapping[str, QuantLinear]
) -> dict[str, Tensor]:
    """Every other tensor: as it is stored, or, where folding changed it, in float32."""
    biases = {f"{name}.bias": layer.bias for name, layer in layers.items()}
    present = {**network.state_dict(), **{n: b for n, b in biases.items() if b is not None}}
    return {
        name: stored if torch.equal(stored.to(present[name]), present[name]) else present[name]
        for name, stored in finished.native.unquantized().items()
    }


# The layout


def _tensors(layer: QuantLinear) -> dict[str, Tensor]:
    width, scale = layer.weight_spec.num_bits, step_sizes(layer)
    # Zero-points are all 2^(bits-1), stored less one; `pack` adds 2^(bits-1) to what it is given.
    zero_points = torch.full((scale.shape[1], layer.out_features), -1, dtype=torch.int8)
    return {
        "qweight": pack(codes(layer), width).T.contiguous(),
        "qzeros": pack(zero_points, width),
        "scales": scale.T.half().contiguous(),
    }


def _config(finished: Finished) -> dict[str, Any]:
    """`quantization_config` of config.json."""
    manifest = finished.native.manifest
    left = [name for name in finished.linears if name not in manifest["layers"]]
    blocks = finished.native.adapter.block_names
    return {
        "quant_method": "auto-round",
        "bits": manifest["weight"]["num_bits"],
        "group_size": manifest["weight"]["group_size"] or -1,
        "sym": True,
        "data_type": "int",
        "packing_format": "auto_round:auto_gptq",
        "block_name_to_quantize": blocks[0].rpartition(".")[0],
        "extra_config": {name: {"bits": 16, "data_type": "fp"} for name in left},
    }
