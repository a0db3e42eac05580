"""Embedded teachers: small models trained on a procedural world, shipped as ordinary folders.

A folder holds what `save_pretrained` wrote, a model card, and nothing else, so that whatever loads
a real checkpoint loads it too. Beside the teachers there is a classifier, whose features image
metrics compare. `python -m recon.zoo.train NAME` reproduces each, `python -m recon.zoo.measure
NAME` measures it.
"""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

SHIPPED: Mapping[str, str] = MappingProxyType(
    {
        "video": "model_index.json",
        "image": "model_index.json",
        "vlm": "config.json",
        "classifier": "model.safetensors",
    }
)
"""Names of the shipped models, and a file that the folder of each must hold."""


def folder(name: str) -> Path:
    """The shipped folder of a model.

    Raises:
        ValueError: There is no model of that name.
        FileNotFoundError: The installation lacks the model's files.
    """
    if name not in SHIPPED:
        message = (
            f"There is no embedded model {name!r}. Choose one of {', '.join(SHIPPED)}, or pass "
            "the path of a checkpoint folder instead."
        )
        raise ValueError(message)
    found = Path(__file__).parent / name
    if not (found / SHIPPED[name]).is_file():
        message = (
            f"The folder of the embedded model {name!r} is missing from this installation. "
            f"Reinstall the package, or make it: python -m recon.zoo.train {name}."
        )
        raise FileNotFoundError(message)
    return found
