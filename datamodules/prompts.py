"""Prompts from a text file, a `datasets` folder or the embedded world, and the seeds of noise."""

import hashlib
import random
from collections.abc import Sequence
from pathlib import Path

from recon.errors import ConfigError
from recon.zoo import world


def read_prompts(path: str, column: str, key: str) -> list[str]:
    """The prompts of a text file (one per line, blank lines apart) or of a `datasets` folder.

    Args:
        path: A text file in UTF-8, or a folder that `datasets.load_from_disk` opens.
        column: Text column of the dataset; a text file has none.
        key: Configuration key, for messages.

    Raises:
        ConfigError: Nothing is there, it is empty or not text, or a prompt stands there twice.
    """
    place = Path(path).expanduser()
    if place.is_dir():
        found = _read_dataset(place, column, key)
    elif place.is_file():
        found = _read_text(place, key)
    else:
        raise ConfigError(
            f"{key} is {path!r}, and {place.absolute()} does not exist. Give a text file with one "
            "prompt per line, a datasets folder, or null for the embedded world's prompts."
        )
    if not found:
        raise ConfigError(f"{key} is {path!r}, which holds no prompt. Write one per line.")
    seen: dict[str, int] = {}
    for number, prompt in enumerate(found, start=1):
        if prompt in seen:
            raise ConfigError(
                f"{key} is {path!r}, whose prompts {seen[prompt]} and {number} are both "
                f"{prompt!r}. Keep each prompt once."
            )
        seen[prompt] = number
    return found


def world_prompts(split: world.Split, count: int, seed: int) -> list[str]:
    """`count` different prompts of the embedded world, balanced over what it shows.

    Raises:
        ConfigError: The world does not word that many scenes.
    """
    most = len(world.every_prompt(split))
    if count > most:
        raise ConfigError(
            f"{count} prompts are asked of the embedded world, which words {most} for "
            f"{split!r}. Ask for fewer, or give a file of prompts."
        )
    found: dict[str, None] = {}
    while len(found) < count:
        # Rounds go on from another seed: later rounds of one seed may repeat earlier wordings.
        found |= dict.fromkeys(world.prompts(seed, count, split))
        seed = noise_seed("prompts", seed, len(found))
    return list(found)[:count]


def draw(pool: Sequence[str], count: int, seed: int) -> list[str]:
    """`count` prompts of a pool in random order; a larger count only adds to them."""
    shuffled = list(pool)
    random.Random(seed).shuffle(shuffled)
    return shuffled[:count]


def noise_seed(purpose: str, seed: int, index: int) -> int:
    """Seed of one prompt's noise, in [0, 2^31): no two purposes, runs or prompts share one."""
    text = f"{purpose}:{seed}:{index}".encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:4], "big") >> 1


def text_hash(texts: Sequence[str]) -> str:
    """Hash of a list of texts in their order."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


def _read_text(place: Path, key: str) -> list[str]:
    try:
        lines = place.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{key} is {str(place)!r}, which cannot be read as UTF-8 text: {error}. Give a text "
            "file with one prompt per line."
        ) from error
    return [line.strip() for line in lines if line.strip()]


def _read_dataset(place: Path, column: str, key: str) -> list[str]:
    from datasets import DatasetDict, load_from_disk  # heavy: only for a dataset

    try:
        rows = load_from_disk(str(place))
    except Exception as error:  # datasets raises whatever Arrow, JSON or the file system raise
        raise ConfigError(
            f"{key} is {str(place)!r}, a folder that datasets.load_from_disk does not open: "
            f"{error}. Write it with Dataset.save_to_disk, or give a text file."
        ) from error
    if isinstance(rows, DatasetDict):
        raise ConfigError(
            f"{key} is {str(place)!r}, which holds the splits {sorted(rows)}. Name one of its "
            f"folders, such as {str(place / sorted(rows)[0])!r}."
        )
    if column not in rows.column_names:
        raise ConfigError(
            f"prompt_column is {column!r}, but {key} ({place}) has the columns "
            f"{rows.column_names}. Name the one that holds the prompts."
        )
    return [str(text).strip() for text in rows[column] if str(text).strip()]
