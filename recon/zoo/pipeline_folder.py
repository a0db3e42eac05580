"""Writing a teacher's folder."""

import tempfile
from pathlib import Path
from typing import Any, Protocol


class Saveable(Protocol):
    """A pipeline, network or processor of diffusers or transformers."""

    def save_pretrained(self, save_directory: str) -> Any:
        """Write its files into a folder."""


def write(saved: Saveable, out: Path) -> None:
    """Write what `save_pretrained` gives into the folder `out`, which is made where it is missing.

    Each file appears whole: it is written aside and then renamed. Other files of `out`, such as
    the model card, stay as they are.
    """
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as aside:
        saved.save_pretrained(aside)
        for file in sorted(path for path in Path(aside).rglob("*") if path.is_file()):
            target = out / file.relative_to(aside)
            target.parent.mkdir(exist_ok=True)
            file.chmod(0o644)  # safetensors writes for the owner alone
            file.replace(target)
