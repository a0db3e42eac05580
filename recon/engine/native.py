"""`quantized/`: the lossless form of a result, which loads with neither teacher nor data.

config.json             the network's own configuration
network.safetensors     every tensor that is not quantised: norms, biases, tables, what stands
outside the blocks unless it is quantised too, as they are or as the run tuned them
quantized.safetensors   per layer `codes` (int32, packed), `scale`, and where there are any
`zero_point` (int8, of signed codes) and `activation_clip`; per group of layers that share an input
the transform's `channel_scale`, `left`, `right`, `rotated_scale` and fixed grid, under its first
layer; per attention whose products are quantised on fixed grids, each operand's step and zero-point
manifest.json           method, bits and error, units and findings; shapes, grids, owner and own
error of each layer, places where a layer stands once more; fingerprint; written last, with a
checksum of the other files
"""

import hashlib
import importlib
import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import recon
from recon.atomic import whole_folder, write_json
from recon.engine.assembly import adopted, placed_in
from recon.engine.attention import own, put_in
from recon.engine.stem_and_head import copies
from recon.errors import CheckpointMismatch
from recon.layers.quant_attention import QuantAttention
from recon.layers.quant_linear import QuantLinear
from recon.layers.transform import InputTransform
from recon.models.adapter import ModelAdapter
from recon.quantizers.spec import QuantSpec

if TYPE_CHECKING:
    from recon.engine.reconstruction import Reconstruction

FORMAT_VERSION = 3
FILES = ("config.json", "network.safetensors", "quantized.safetensors")


def write_native(module: "Reconstruction", folder: Path) -> None:
    """Writes the closed layers of `module` and the rest of its network to `folder`."""
    with whole_folder(folder) as aside:
        _write(module, aside)


def _write(module: "Reconstruction", folder: Path) -> None:
    layers = {
        name.replace("/", "."): layer
        for name, layer in module.quantizers.items()
        if isinstance(layer, QuantLinear)
    }
    adapter = module.adapter
    shutil.copyfile(adapter.network_folder / "config.json", folder / "config.json")
    tuned = {name: tensor.detach().cpu() for name, tensor in module.tuned_tensors().items()}
    further = copies(module)
    replaced = {*tuned, *(f"{name}.weight" for name in (*layers, *further))}
    kept = [name for name in adapter.weights.keys() if name not in replaced]  # noqa: SIM118
    dtype = adapter.weights.dtype()
    rest = adapter.weights.load_names(kept, dtype, "cpu")
    save_file(rest | tuned, folder / "network.safetensors")
    tensors, owners = _tensors(layers)
    attentions = {
        name.replace("/", "."): part
        for name, part in module.quantizers.items()
        if isinstance(part, QuantAttention)
    }
    for name, part in attentions.items():
        tensors |= {f"{name}.{key}": value.cpu() for key, value in part.state_dict().items()}
    save_file(tensors, folder / "quantized.safetensors")
    manifest = {
        "format_version": FORMAT_VERSION,
        "recon": recon.__version__,
        "method": type(module).__name__,
        "adapter": f"{type(adapter).__module__}.{type(adapter).__qualname__}",
        "adapter_arguments": adapter.arguments(),
        "dtype": str(adapter.compute_dtype(module.run_device)).removeprefix("torch."),
        "weight": asdict(module.weight),
        "layers": {
            name: {
                "out_features": layer.out_features,
                "in_features": layer.in_features,
                "weight": asdict(layer.weight_spec),
                "activation": layer.activation_spec and asdict(layer.activation_spec),
                "transform": owners.get(name),
                **module.layer_errors.get(name, {}),
            }
            for name, layer in layers.items()
        },
        "copies": dict(further),
        "attentions": {
            name: {"activation": asdict(part.activation), "softmax_bits": part.softmax_bits}
            for name, part in attentions.items()
        },
        "error": module.final_error,
        "units": {unit.name: list(unit.blocks) for unit in module.units},
        "unit_errors": module.history,
        "findings": module.findings,
        "fingerprint": module.fingerprint,
        "files": {name: _checksum(folder / name) for name in FILES},
    }
    write_json(folder / "manifest.json", manifest)


def _tensors(layers: dict[str, QuantLinear]) -> tuple[dict[str, Tensor], dict[str, str]]:
    tensors: dict[str, Tensor] = {}
    owner_of: dict[int, str] = {}
    owners: dict[str, str] = {}
    for name, layer in layers.items():
        for key in ("codes", "scale", "zero_point", "activation_clip"):
            value = getattr(layer, key)
            if value is not None:
                tensors[f"{name}.{key}"] = value.cpu().contiguous()
        if layer.transform is None:
            continue
        owners[name] = owner = owner_of.setdefault(id(layer.transform), name)
        for key in InputTransform.PARTS:
            value = layer.transform.part(key)
            if value is not None and owner == name:
                tensors[f"{name}.transform.{key}"] = value.detach().cpu().contiguous()
    return tensors, owners


@dataclass(frozen=True)
class Native:
    """A `quantized` folder whose files are those its manifest lists."""

    folder: Path
    manifest: dict[str, Any]
    adapter: ModelAdapter
    """On the folder itself: there is a network in it, and no pipeline."""

    def unquantized(self) -> dict[str, Tensor]:
        """Every tensor that is not quantised, by its name in the network, as it is stored."""
        return load_file(self.folder / "network.safetensors")

    def layers(self, device: torch.device | str = "cpu") -> dict[str, QuantLinear]:
        """The closed layers by full dotted name, each time anew; their biases are not theirs."""
        saved = load_file(self.folder / "quantized.safetensors", device=str(device))
        described: dict[str, Any] = self.manifest["layers"]
        groups: dict[str, list[str]] = {}
        for name, facts in described.items():
            groups.setdefault(facts["transform"] or name, []).append(name)
        return adopted(
            saved,
            {n: (facts["out_features"], facts["in_features"]) for n, facts in described.items()},
            list(groups.values()),
            {name: QuantSpec(**facts["weight"]) for name, facts in described.items()},
            {n: f["activation"] and QuantSpec(**f["activation"]) for n, f in described.items()},
        )

    def attentions(self, device: torch.device | str = "cpu") -> dict[str, QuantAttention]:
        """The quantised products of attentions by full dotted name, each time anew."""
        saved = load_file(self.folder / "quantized.safetensors", device=str(device))
        return {
            name: QuantAttention.closed(
                own(saved, name), QuantSpec(**facts["activation"]), facts["softmax_bits"]
            )
            for name, facts in self.manifest["attentions"].items()
        }

    def network(self, device: torch.device | str = "cpu") -> nn.Module:
        """The public class with the closed layers in it, in eval mode, not requiring gradients."""
        network = self.adapter.network_from(self.unquantized(), device)
        layers = self.layers(device)
        placed_in(network, layers, self.manifest["copies"])
        for layer in layers.values():
            # A parameter goes where the network is moved to.
            layer.bias = None if layer.bias is None else nn.Parameter(layer.bias)
            layer.to(device)
        put_in(self.adapter, network, self.attentions(device))
        return network.requires_grad_(False).eval()


def read_native(
    run: str | Path,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
) -> Native:
    """The result of a finished run, without its weights.

    Args:
        run: Run folder, or its `quantized` folder.
        dtype: Floating type of the network, a word of `ModelAdapter`; None: that of the run.

    Raises:
        CheckpointMismatch: The folder is not there, is damaged, or of another format version.
    """
    folder = Path(run) / "quantized" if (Path(run) / "quantized").is_dir() else Path(run)
    manifest = _manifest(folder)
    adapter = _adapter_class(manifest["adapter"]).of_network_folder(
        folder, dtype or manifest["dtype"], **manifest["adapter_arguments"]
    )
    return Native(folder, manifest, adapter)


def load(run: str | Path, device: torch.device | str = "cpu") -> nn.Module:
    """The quantised network of a finished run: the public class, its linears quantised.

    Put it into the stock pipeline: `pipeline.transformer = recon.load("runs/s2q_vdit")`. Its
    outputs are those the run evaluated, bit for bit on the same kind of machine; quantisation is
    simulated, codes are expanded at every call.

    Args:
        run: Run folder, or its `quantized` folder.
        device: Where the network goes.

    Raises:
        CheckpointMismatch: The folder is not there, is damaged, or of another format version.
    """
    return read_native(run).network(device)


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / "manifest.json"
    if not path.is_file():
        raise CheckpointMismatch(
            f"{path} is missing: {folder} is no finished result. Give the folder of a run that "
            "ended, or continue it with --ckpt_path last."
        )
    manifest: dict[str, Any] = json.loads(path.read_text())
    if manifest.get("format_version") != FORMAT_VERSION:
        raise CheckpointMismatch(
            f"{path} has format_version {manifest.get('format_version')}, this recon reads "
            f"{FORMAT_VERSION}. Use the recon that wrote it ({manifest.get('recon')})."
        )
    for name, checksum in manifest["files"].items():
        if not (folder / name).is_file() or _checksum(folder / name) != checksum:
            raise CheckpointMismatch(
                f"{folder / name} is missing or differs from what was written. Copy the folder "
                "again, completely."
            )
    return manifest


def _adapter_class(path: str) -> type[ModelAdapter]:
    module, _, name = path.rpartition(".")
    found = getattr(importlib.import_module(module), name, None)
    if not (isinstance(found, type) and issubclass(found, ModelAdapter)):
        raise CheckpointMismatch(
            f"The manifest names the adapter {path}, which is no ModelAdapter. Install the package "
            "that defines it."
        )
    return found


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
