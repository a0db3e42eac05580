"""The pictures that generated ones are compared with."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from recon.errors import ConfigError

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})
BATCH = 32
"""Pictures read at a time; fixed, because kernels may round differently for another number."""


def of_the_world(prompts: Sequence[str]) -> bool:
    """Whether all prompts are classes of the embedded world's pictures."""
    from recon.zoo.image_scenes import CLASSES

    return bool(prompts) and set(prompts) <= set(CLASSES)


def drawn_pictures(prompts: Sequence[str], count: int, seed: int) -> Iterator[Tensor]:
    """Freshly drawn scenes of the embedded world, of the prompts in turn.

    Yields:
        Pictures [up to 32, 3, 64, 64] in [0, 1].
    """
    from recon.zoo.image_scenes import CLASSES, pictures, scenes_of

    labels = [CLASSES.index(prompts[i % len(prompts)]) for i in range(count)]
    scenes = scenes_of(labels, seed)
    for start in range(0, count, BATCH):
        yield pictures(scenes[start : start + BATCH]) / 2 + 0.5


def picture_files(folder: Path) -> list[Path]:
    """The pictures in a folder and its subfolders, in the order of their paths.

    Raises:
        ConfigError: There is no such folder, or no picture in it.
    """
    if not folder.is_dir():
        raise ConfigError(
            f"metrics.distribution.reference is {folder}, which is no folder. Give a folder of "
            "pictures, or null."
        )
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not files:
        raise ConfigError(
            f"metrics.distribution.reference is {folder}, which holds no pictures "
            f"({', '.join(sorted(SUFFIXES))}). Give a folder that does."
        )
    return files


def read_pictures(files: Sequence[Path]) -> Iterator[Tensor]:
    """Pictures of files, which must be of one size.

    Yields:
        Pictures [up to 32, 3, height, width] in [0, 1].

    Raises:
        ConfigError: A file cannot be read, or has another size than the first.
    """
    size: torch.Size | None = None
    for start in range(0, len(files), BATCH):
        batch = []
        for file in files[start : start + BATCH]:
            picture = _read(file)
            size = size or picture.shape
            if picture.shape != size:
                raise ConfigError(
                    f"{file} has {_sides(picture.shape)} pixels, {files[0]} has {_sides(size)}; "
                    "reference pictures must be of the generated ones' size. Crop and resize them."
                )
            batch.append(picture)
        yield torch.stack(batch)


def _read(file: Path) -> Tensor:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(file) as image:
            raw = image.convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise ConfigError(
            f"The reference picture {file} cannot be read ({error}). Replace or remove it."
        ) from error
    values = torch.frombuffer(bytearray(raw.tobytes()), dtype=torch.uint8)
    return values.view(raw.height, raw.width, 3).permute(2, 0, 1) / 255


def _sides(shape: Sequence[int]) -> str:
    return f"{shape[-2]} x {shape[-1]}"
