"""Reads and judges the small files that describe a checkpoint folder."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recon.errors import ConfigError


def read_json(path: Path, owner: str) -> dict[str, Any]:
    """The object a JSON file holds.

    Args:
        path: The file.
        owner: Class whose `folder` led here, for the message.

    Raises:
        ConfigError: The file is missing, is not JSON, or holds no object.
    """
    advice = f"{owner}.folder must be a folder as save_pretrained writes it"
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"{path} is missing. {advice}; download it completely.") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path} is not JSON: {error}. {advice}; fetch it again.") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds a {type(content).__name__}, not an object. {advice}.")
    return content


def require_folder(folder: Path, owner: str, example: str) -> None:
    """Refuse a folder that is not there; says how to get it if it may be a hub id.

    Args:
        folder: As the user gave it.
        owner: Class whose `folder` it is, for the message.
        example: A public checkpoint of the family as `owner/name`, or empty.

    Raises:
        ConfigError: It is not a folder.
    """
    if folder.is_dir():
        return
    given = str(folder)
    message = (
        f"{owner}.folder is {given!r}, and {folder.absolute()} is not a folder. recon reads local "
        "folders only."
    )
    # "checkpoints/X" looks like a hub id too: then the name of a known checkpoint helps more.
    looks_like_id = re.fullmatch(r"[\w.-]+/[\w.-]+", given) and not given.startswith("checkpoints/")
    hub_id = given if looks_like_id else example
    if not hub_id:
        raise ConfigError(f"{message} Point folder to a checkpoint.")
    local = f"checkpoints/{hub_id.split('/')[-1]}"
    known = f" (a public checkpoint of this family is {example})" if example else ""
    raise ConfigError(
        f"{message} To use a checkpoint of the hub{known}, download it, `hf download {hub_id} "
        f"--local-dir {local}`, and set folder: {local}."
    )


def require_class(
    file: Path, content: Mapping[str, Any], allowed: tuple[str, ...], owner: str
) -> None:
    """Refuse a description of another class than the family's.

    Args:
        file: Where the content is from.
        content: Of a diffusers (`_class_name`) or transformers (`architectures`) file.
        allowed: Class names of the family.
        owner: Class whose `folder` led here, for the message.

    Raises:
        ConfigError: It names another class, or none.
    """
    found = content.get("_class_name") or (content.get("architectures") or [None])[0]
    if found not in allowed:
        raise ConfigError(
            f"{file} names the class {found!r}; {owner} reads {' or '.join(allowed)}. Point folder "
            "to such a checkpoint, or choose the adapter of that family."
        )


def numbered_blocks(config: Mapping[str, Any], folder: Path, parts: str) -> tuple[str, ...]:
    """Names of a diffusers transformer's blocks: `parts`.0 and so on.

    Args:
        config: What config.json holds.
        folder: Where it stands, for the message.
        parts: Name of the list that holds the blocks.

    Raises:
        ConfigError: num_layers is missing or below 1.
    """
    layers = config.get("num_layers")
    if not isinstance(layers, int) or layers < 1:
        raise ConfigError(
            f"num_layers is {layers!r} in {folder / 'config.json'}; it must be a whole number of "
            "at least 1. Use the config.json saved with the weights."
        )
    return tuple(f"{parts}.{index}" for index in range(layers))
