"""How large the parts of a pipeline beside its network are, from their files or their configs."""

import json
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from recon.models.folder import read_json
from recon.models.weights import WeightStore

LIBRARIES = ("diffusers", "transformers")


def elements_beside(folder: Path, network: str) -> tuple[int, list[str]]:
    """Numbers in the weights of a pipeline's parts; where there are none, as its config has them.

    Args:
        folder: Of the pipeline.
        network: Name of the part that does not count.

    Returns:
        Their sum, and the names of parts with weights of which neither is there.
    """
    total, unknown = 0, []
    for name, public in _parts(folder).items():
        if name == network:
            continue
        found = _elements(folder / name, public)
        if found is None:
            unknown.append(name)
        total += found or 0
    return total, unknown


def _parts(folder: Path) -> dict[str, tuple[str, str]]:
    """Library and class of each part: of model_index.json, or of the parts' own config.json."""
    index = folder / "model_index.json"
    if index.is_file():
        entries = json.loads(index.read_text(encoding="utf-8")).items()
        return {k: (str(v[0]), str(v[1])) for k, v in entries if isinstance(v, list) and v[0]}
    return {
        path.parent.name: _described(json.loads(path.read_text(encoding="utf-8")))
        for path in sorted(folder.glob("*/config.json"))
    }


def _described(config: dict[str, Any]) -> tuple[str, str]:
    if "_class_name" in config:
        return "diffusers", str(config["_class_name"])
    return "transformers", str((config.get("architectures") or [""])[0])


def _elements(folder: Path, public: tuple[str, str]) -> int | None:
    """Numbers of one part, 0 of what is no network; None: they are not to be found."""
    if any(folder.glob("*.safetensors")):
        return WeightStore(folder).elements()
    library, name = public
    kind = getattr(import_module(library), name, None) if library in LIBRARIES else None
    if kind is None:
        return None
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        return 0  # a tokenizer or a scheduler
    if not (folder / "config.json").is_file():
        return None
    try:
        with torch.device("meta"):
            network = _built(kind, library, read_json(folder / "config.json", name))
    except (TypeError, ValueError, RuntimeError):  # of another release or class
        return None
    return sum(parameter.numel() for parameter in network.parameters())


def _built(kind: Any, library: str, config: dict[str, Any]) -> nn.Module:
    if library == "diffusers":
        return cast(nn.Module, kind.from_config(config))
    return cast(nn.Module, kind(kind.config_class.from_dict(config)))
