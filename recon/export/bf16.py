"""De-quantised weights in bfloat16, with every transform multiplied into them: loads anywhere."""

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import torch

from recon.export import layer as layers_of
from recon.export.finished import Finished
from recon.export.format import Format, Written, public_folder
from recon.export.layer import merged_weight
from recon.export.public import write_public
from recon.layers.quant_linear import QuantLinear

BF16_ROUNDING = 1e-2
"""Relative difference of a network's output that rounding its tensors to bfloat16 (each by at most
2^-9 of itself) may make."""


class Bf16(Format):
    """The public checkpoint that the quantised weights amount to."""

    name: ClassVar = "bf16"
    libraries: ClassVar = ("diffusers", "transformers")
    weights_only: ClassVar = True

    def misfits(self, finished: Finished) -> list[str]:
        """Nothing: every transform is linear, so that its product with a weight is a weight."""
        return []

    def stored_bits(self, num_bits: int) -> int:
        """16, whatever the bits."""
        return 16

    def as_loaded(
        self, finished: Finished, dtype: torch.dtype
    ) -> Iterator[tuple[str, QuantLinear]]:
        """Plain weights."""
        for name, layer in finished.layers.items():
            layer.resident_weight = layers_of.merged_weight(layer).bfloat16()
            layer.transform = layer.activation_spec = None
            yield name, layer

    def write(self, finished: Finished, folder: Path) -> Written:
        """Every floating tensor in bfloat16."""
        state = {
            name: tensor.bfloat16() if tensor.is_floating_point() else tensor
            for name, tensor in finished.native.unquantized().items()
        }
        merged = {name: merged_weight(layer).bfloat16() for name, layer in finished.layers.items()}
        copies: dict[str, str] = finished.native.manifest["copies"]
        # Copies of their own: files hold no tensor twice.
        merged |= {name: merged[first].clone() for name, first in copies.items()}
        shapes = {name: tensor.shape for name, tensor in finished.empty.state_dict().items()}
        state |= {
            f"{name}.weight": weight.reshape(shapes[f"{name}.weight"])  # of a convolution
            for name, weight in merged.items()
        }
        target = public_folder(finished, folder)
        write_public(finished, target, state, None)
        network = finished.native.adapter.network_from(state, "cpu")
        return Written(
            network=network,
            library=finished.library,
            folder=target,
            linear_bytes=sum(merged[name].nbytes for name in finished.native.manifest["layers"]),
            runs_as=("plain bfloat16 layers, on any hardware, as fast as full precision",),
            load_dtype="bfloat16" if finished.library == "diffusers" else None,
            run_tolerance=BF16_ROUNDING,
            quantized=False,
            notes=("Weights only: activations are not quantised in this format.",),
        )
