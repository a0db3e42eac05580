"""Writing a teacher's folder."""

import tempfile
from pathlib import Path

from diffusers import DiffusionPipeline


def write(pipeline: DiffusionPipeline, out: Path) -> None:
    """Write a pipeline's files into the folder `out`, which is made where it is missing.

    Each file appears whole: it is written aside and then renamed. Files of `out` that are not the
    pipeline's, such as the model card, stay as they are.
    """
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as aside:
        pipeline.save_pretrained(aside)
        for file in sorted(path for path in Path(aside).rglob("*") if path.is_file()):
            target = out / file.relative_to(aside)
            target.parent.mkdir(exist_ok=True)
            file.chmod(0o644)  # safetensors writes for the owner alone
            file.replace(target)
