"""Finding and examining the checkpoints of a run folder, before anything is started."""

import math
from pathlib import Path
from typing import Any

import torch

from recon.atomic import PARTIAL
from recon.engine.resume import refuse_unclosed
from recon.errors import CheckpointMismatch

FOLDER = "checkpoints"


def written(root: Path) -> list[Path]:
    """Checkpoints of a run, farthest first; files being written are not among them."""
    found = [p for p in (root / FOLDER).glob("*.ckpt") if not p.name.startswith(".")]
    return sorted(found, key=_progress, reverse=True)


def clear_unfinished(root: Path) -> None:
    """Removes what a killed process left half written, which no later write would replace."""
    for aside in (root / FOLDER).glob(f"{PARTIAL}*"):
        aside.unlink(missing_ok=True)


def _progress(path: Path) -> tuple[float, int, str]:
    """Optimizer steps done, as the file says: a copied run folder has other times.

    A file that cannot be read comes first, to be refused by name instead of passed over.
    """
    try:
        steps = float(_read(path)["global_step"])
    except Exception:  # as many kinds as in `examined`
        steps = math.inf
    return steps, path.stat().st_mtime_ns, path.name


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return content


def examined(path: Path) -> dict[str, Any]:
    """The checkpoint's content, on the CPU, memory-mapped.

    Raises:
        CheckpointMismatch: The file is missing, cut short, not recon's, or of a place from which
            a run cannot go on; names the next older file of the folder.
    """
    others = [p for p in written(path.parent.parent) if p != path] if path.exists() else []
    older = f"The next older one is {others[0]}." if others else "There is no other one beside it."
    if not path.is_file():
        raise CheckpointMismatch(f"There is no checkpoint {path}. Check --ckpt_path.")
    try:
        content = _read(path)
    except Exception as error:  # torch raises half a dozen kinds for a damaged file
        raise CheckpointMismatch(
            f"{path} ({path.stat().st_size:,} bytes) cannot be read, it is damaged or cut short: "
            f"{type(error).__name__}. {older} Pass it as --ckpt_path."
        ) from error
    if "recon" not in content:
        raise CheckpointMismatch(f"{path} was not written by recon. {older}")
    refuse_unclosed(content)
    return content
