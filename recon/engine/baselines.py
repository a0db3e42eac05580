"""Outputs that do not depend on what a run learned, kept on disk for the runs compared with it."""

import hashlib
import json
import os
import pickle
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from recon.atomic import whole_file
from recon.errors import ConfigError
from recon.layers.quant_attention import QuantAttention
from recon.layers.quant_linear import QuantLinear
from recon.models.adapter import ModelAdapter
from recon.models.weights import FINGERPRINT_BYTES


class Baselines:
    """What the teacher and round-to-nearest make, kept in a folder under all that it depends on.

    Args:
        folder: Where outputs are kept, one file per batch and form.
        adapter: Of the teacher; a change of any file in a folder it names is another teacher.
        settings: What outputs depend on beside it: steps, guidance, device, ...
    """

    def __init__(self, folder: Path, adapter: ModelAdapter, settings: Mapping[str, Any]) -> None:
        self.folder = folder
        arguments = adapter.arguments()
        others = (Path(value) for value in arguments.values() if isinstance(value, str))
        self._shared = {
            "teacher": [_files(place) for place in (adapter.folder, *others) if place.is_dir()],
            "adapter": [type(adapter).__qualname__, arguments],
            "settings": dict(settings),
            # Sums are split by threads, and rounded as a library's version does.
            "threads": torch.get_num_threads(),
            "versions": {name: version(name) for name in ("torch", "diffusers", "transformers")},
        }

    def get(self, network: nn.Module, batch: Mapping[str, Any], make: Callable[[], Any]) -> Any:
        """The outputs for a batch: those kept, or else what `make` gives, which are kept then.

        A damaged file is made anew.

        Args:
            network: The teacher, or its round-to-nearest form; its quantisers are read.
            batch: What they are made of: texts, numbers, tensors.
            make: Makes them: tensors on the CPU, in lists and dicts with texts and numbers.

        Raises:
            ConfigError: The folder cannot be written.
        """
        content = {**self._shared, "network": _quantizers(network), "batch": dict(batch)}
        text = json.dumps(content, sort_keys=True, default=_content)
        path = self.folder / f"{hashlib.sha256(text.encode()).hexdigest()}.pt"
        try:
            return torch.load(path, weights_only=True)
        except (OSError, EOFError, RuntimeError, pickle.UnpicklingError):
            made = make()
        try:
            with whole_file(path, writer=f"{os.getpid()}.") as aside:
                torch.save(made, aside)
        except OSError as error:
            raise ConfigError(
                f"data.baselines is {str(self.folder)!r}, which cannot be written: {error}. Name a "
                "folder that can, or null."
            ) from error
        return made


def _content(tensor: Tensor) -> list[Any]:
    """What stands for a tensor in a file's key."""
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return [str(tensor.dtype), list(tensor.shape), hashlib.sha256(data).hexdigest()]


def _quantizers(network: nn.Module) -> dict[str, Any]:
    """Every quantiser of a network by its place; none in full precision."""
    found: dict[str, Any] = {}
    for name, part in network.named_modules():
        if isinstance(part, QuantLinear):
            activation = part.activation_spec
            found[name] = [asdict(part.weight_spec), activation and asdict(activation)]
        elif isinstance(part, QuantAttention):
            found[name] = [asdict(part.activation), part.softmax_bits]
    return found


def _files(folder: Path) -> str:
    """Hash over name, size and both ends of every file below `folder`, as weights have."""
    digest = hashlib.sha256()
    for path in sorted(file for file in folder.rglob("*") if file.is_file()):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder)}\0{size}\0".encode())
        with path.open("rb") as file:
            digest.update(file.read(FINGERPRINT_BYTES))
            file.seek(max(0, size - FINGERPRINT_BYTES))
            digest.update(file.read())
    return digest.hexdigest()
