"""A network on disk as its own library writes it."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from recon.engine.assembly import placed_in
from recon.export.finished import Finished
from recon.layers.quant_linear import QuantLinear


def public_network(finished: Finished, layers: Mapping[str, QuantLinear]) -> nn.Module:
    """The public class in float32, with these layers in place of the quantised linears.

    A layer gets the bias of the linear it stands for.
    """
    native = finished.native
    network = native.adapter.network_from(native.unquantized(), "cpu")
    placed = placed_in(network, layers, native.manifest["copies"])
    return placed.requires_grad_(False).eval()


def plain_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """An nn.Linear that holds these tensors."""
    out, in_ = weight.shape
    linear = nn.Linear(in_, out, bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear


def write_public(
    finished: Finished,
    folder: Path,
    state: dict[str, Tensor],
    quantization: Mapping[str, Any] | None,
    header: dict[str, str] | None = None,
) -> None:
    """Writes config and weights so that `from_pretrained` of the public class reads them.

    Args:
        finished: The run.
        folder: Does not exist yet.
        state: Tensors by module names; transformers stores some under older names, as its own
            `save_pretrained` does.
        quantization: `quantization_config` of config.json.
        header: Further metadata of the weight files (diffusers only).
    """
    network: Any = finished.empty
    if finished.library == "transformers":
        network.save_pretrained(folder, state_dict=state)
    else:
        network.save_config(folder)
        _write_diffusers(folder, state, header or {})
    rest = [state[name] for name in finished.native.unquantized() if name in state]
    _describe(folder / "config.json", finished.library, floating_type(rest), quantization)


def floating_type(tensors: Iterable[Tensor]) -> torch.dtype:
    """The floating type that most of the tensors have."""
    floating = [tensor.dtype for tensor in tensors if tensor.is_floating_point()]
    return max(sorted(set(floating), key=str), key=floating.count)


def _write_diffusers(folder: Path, state: dict[str, Tensor], header: dict[str, str]) -> None:
    # What ModelMixin.save_pretrained does; that one takes no state_dict.
    from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
    from huggingface_hub import save_torch_state_dict

    pattern = SAFETENSORS_WEIGHTS_NAME.replace(".safetensors", "{suffix}.safetensors")
    metadata = {"format": "pt", **header}
    save_torch_state_dict(
        state, folder, filename_pattern=pattern, max_shard_size="10GB", metadata=metadata
    )


def _describe(
    file: Path, library: str, dtype: torch.dtype, quantization: Mapping[str, Any] | None
) -> None:
    config: dict[str, Any] = json.loads(file.read_text())
    config.pop("_name_or_path", None)
    if library == "transformers":
        config["dtype"] = str(dtype).removeprefix("torch.")
    if quantization is not None:
        config["quantization_config"] = dict(quantization)
    file.write_text(json.dumps(config, indent=2) + "\n")
