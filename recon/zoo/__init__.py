"""Embedded teachers: small models trained on a procedural world, shipped as ordinary folders.

A folder holds what `save_pretrained` wrote, a model card, and nothing else, so that whatever loads
a real checkpoint loads it too. `python -m recon.zoo.train NAME` reproduces one, `python -m
recon.zoo.measure NAME` measures it.
"""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

TEACHERS: Mapping[str, str] = MappingProxyType(
    {"video": "model_index.json", "image": "model_index.json", "vlm": "config.json"}
)
"""Names of the shipped teachers, and the file that the folder of each must hold."""


def folder(name: str) -> Path:
    """The shipped folder of a teacher.

    Raises:
        ValueError: There is no teacher of that name.
        FileNotFoundError: The installation lacks the teacher's files.
    """
    if name not in TEACHERS:
        message = (
            f"There is no embedded teacher {name!r}. Choose one of {', '.join(TEACHERS)}, or pass "
            "the path of a checkpoint folder instead."
        )
        raise ValueError(message)
    found = Path(__file__).parent / name
    if not (found / TEACHERS[name]).is_file():
        message = (
            f"The folder of the embedded teacher {name!r} is missing from this installation. "
            f"Reinstall the package, or make it: python -m recon.zoo.train {name}."
        )
        raise FileNotFoundError(message)
    return found
