"""compressed-tensors, for networks of transformers: read by transformers, vLLM and SGLang.

Source: compressed-tensors 0.20 (pack-quantized, int-quantized) and what transformers 5.23 makes of
it; written here rather than by the library, which would round the weights anew.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from recon.export import layer as layers_of
from recon.export.finished import Finished
from recon.export.format import ROUNDING, Format, Written, public_folder
from recon.export.layer import channel_scale, codes, obstacles, static_range, step_sizes
from recon.export.public import write_public
from recon.layers.quant_linear import QuantLinear
from recon.quantizers.packing import pack
from recon.quantizers.spec import QuantSpec

VERSION = "0.20.0"
"""Of the format, as its files name it."""


@dataclass(frozen=True)
class _Scheme:
    """What the layers of one config group have in common."""

    weight: QuantSpec
    activation: QuantSpec | None

    @property
    def format(self) -> str:
        """int-quantized where an integer product could take both sides, else dense packing."""
        eight = self.weight.num_bits == 8 and self.weight.strategy != "group"
        both = eight and self.activation is not None and self.activation.num_bits == 8
        return "int-quantized" if both else "pack-quantized"

    @property
    def description(self) -> dict[str, Any]:
        """As an entry of `config_groups`, without targets."""
        return {
            "weights": _weights(self.weight),
            "input_activations": None if self.activation is None else _inputs(self.activation),
            "output_activations": None,
            "format": self.format,
        }

    @property
    def runs_as(self) -> str:
        """What computes such layers, where."""
        activation = 16 if self.activation is None else self.activation.num_bits
        kind = f"W{self.weight.num_bits}A{activation}"
        vllm = "vLLM may refuse it or run W4A16: simulation (threads, not run here)"
        if self.activation is None:
            vllm = "vLLM has kernels for 4 and 8 bits (threads, not run here)"
        elif self.format == "int-quantized":
            vllm = "vLLM has int8 kernels (threads, not run here)"
        return f"{kind}: simulation in transformers, on any hardware, no gain in speed; {vllm}"


class CompressedTensors(Format):
    """Packed codes beside their step sizes; the quantisation of inputs in config.json."""

    name: ClassVar = "compressed-tensors"
    libraries: ClassVar = ("transformers",)
    packages: ClassVar = {"compressed_tensors": "compressed-tensors"}

    def misfits(self, finished: Finished) -> list[str]:
        """Transforms, clips, and ranges that loaders do not compute."""
        return obstacles(
            finished.layers,
            layers_of.rotated,
            layers_of.clipped,
            layers_of.otherwise_ranged,
            layers_of.oddly_shared,
            layers_of.shifted,
            _scaled,
        )

    def stored_bits(self, num_bits: int) -> int:
        """As many as it has."""
        return num_bits

    def write(self, finished: Finished, folder: Path) -> Written:
        """Weights as codes, everything else as it is."""
        layers = finished.layers
        schemes = {name: _Scheme(q.weight_spec, q.activation_spec) for name, q in layers.items()}
        stored: dict[str, Tensor] = {}
        for name, layer in layers.items():
            stored |= {f"{name}.{key}": t for key, t in _tensors(layer, schemes[name]).items()}
        target = public_folder(finished, folder)
        state = {**finished.native.unquantized(), **stored}
        write_public(finished, target, state, quantization_config(schemes, finished.linears))
        kinds = dict.fromkeys(scheme.runs_as for scheme in schemes.values())
        shifted = any(_zero_point(layer) is not None for layer in layers.values())
        return Written(
            network=None,
            library=finished.library,
            folder=target,
            linear_bytes=sum(tensor.nbytes for tensor in stored.values()),
            runs_as=tuple(kinds),
            # The zero-point is added before rounding there and after it here: ties may differ.
            run_tolerance=ROUNDING if shifted else 0.0,
            rounds_otherwise=shifted,
        )


def quantization_config(schemes: Mapping[str, _Scheme], linears: Sequence[str]) -> dict[str, Any]:
    """`quantization_config` of config.json.

    Args:
        schemes: Of every quantised Linear, by full dotted name.
        linears: Names of all Linears.
    """
    distinct = list(dict.fromkeys(schemes.values()))
    formats = {scheme.format for scheme in distinct}
    groups = {
        f"group_{number}": {
            # A class for all, where it serves: vLLM names layers otherwise, and fuses some.
            "targets": ["Linear"]
            if len(distinct) == 1
            else [name for name, found in schemes.items() if found == scheme],
            **scheme.description,
        }
        for number, scheme in enumerate(distinct)
    }
    return {
        "quant_method": "compressed-tensors",
        "version": VERSION,
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ignored(set(schemes), linears),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def ignored(quantized: set[str], linears: Sequence[str]) -> list[str]:
    """The Linears that stay, as few patterns that match no other.

    A part of the network without a quantised Linear is named as a whole, by a regular expression
    that finds it whatever a library calls the modules around it.

    >>> ignored({"m.text.0.up"}, ["m.text.0.up", "m.tower.0.fc1", "m.tower.0.fc2", "lm_head"])
    ['re:.*tower.*', 'lm_head']
    """
    patterns: dict[str, None] = {}
    for name in linears:
        if name in quantized:
            continue
        steps = name.split(".")
        whole = next(
            ".".join(steps[:depth])
            for depth in range(1, len(steps) + 1)
            if not any(f"{q}.".startswith(".".join(steps[:depth]) + ".") for q in quantized)
        )
        part = whole.rpartition(".")[2]
        loose = whole != name and not any(part in q for q in quantized)
        patterns[f"re:.*{part}.*" if loose else name] = None
    return list(patterns)


def _scaled(layer: QuantLinear) -> str | None:
    if channel_scale(layer) is None:
        return None
    return "multiplies each channel of its input by a factor, which has no place there"


def _tensors(layer: QuantLinear, scheme: _Scheme) -> dict[str, Tensor]:
    integers = codes(layer)
    found: dict[str, Tensor] = {"weight_scale": step_sizes(layer)}
    if scheme.format == "int-quantized":
        found["weight"] = integers
    else:
        found["weight_packed"] = pack(integers, layer.weight_spec.num_bits)
        found["weight_shape"] = torch.tensor(integers.shape)
    fixed = static_range(layer)
    if fixed is not None:
        # A copy: linears of one input share their range, and files hold no tensor twice.
        found["input_scale"] = fixed.step.detach().float().reshape(1).clone()
        zero_point = _zero_point(layer)
        if zero_point is not None:
            found["input_zero_point"] = zero_point
    return found


def _zero_point(layer: QuantLinear) -> Tensor | None:
    """int8 [1]: codes from 0 there lie around 0 here."""
    fixed, spec = static_range(layer), layer.activation_spec
    if fixed is None or spec is None or spec.symmetric:
        return None
    return (fixed.zero_point - (1 << (spec.num_bits - 1))).to(torch.int8).reshape(1)


def _weights(spec: QuantSpec) -> dict[str, Any]:
    return {
        "num_bits": spec.num_bits,
        "type": "int",
        "symmetric": True,
        "strategy": "group" if spec.strategy == "group" else "channel",
        "group_size": spec.group_size,
        "dynamic": False,
    }


def _inputs(spec: QuantSpec) -> dict[str, Any]:
    return {
        "num_bits": spec.num_bits,
        "type": "int",
        "symmetric": spec.symmetric,
        "strategy": spec.strategy,
        "dynamic": spec.dynamic,
    }
