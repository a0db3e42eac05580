"""A folder that is there complete or not at all."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from recon.atomic import whole_folder
from recon.errors import ExportError

REPORT = "export.json"
"""Written last: the folder of an export has one, and nothing else does."""


def refuse_taken(target: Path, *, force: bool) -> None:
    """Does nothing if an export may be put there.

    Raises:
        ExportError: Something is there, and it is no export, or replacing it was not asked for; or
            it would lie in a file.
    """
    if not target.exists():
        _refuse_inside_file(target)
        return
    empty = target.is_dir() and not any(target.iterdir())
    if not force and not empty:
        raise ExportError(
            f"{target} exists and is not overwritten. Give another --out, or --force to replace it."
        )
    if not empty and not (target / REPORT).is_file():
        raise ExportError(
            f"{target} exists and is no export ({REPORT} is missing): it is not replaced, even "
            "with --force. Give another --out."
        )


def _refuse_inside_file(target: Path) -> None:
    existing = _nearest(target)
    if not existing.is_dir():
        raise ExportError(
            f"{target} would lie in {existing}, which is a file and no folder. Give another --out."
        )


def _nearest(target: Path) -> Path:
    """The path itself, or the nearest above it that is there."""
    existing = target.absolute()
    while not existing.exists():
        existing = existing.parent
    return existing


def refuse_full(target: Path, needed: int) -> None:
    """Does nothing if the disk has room.

    Raises:
        ExportError: Names what is needed and what is free.
    """
    existing = _nearest(target)
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise ExportError(
            f"The export needs about {needed:,} bytes and {existing} has {free:,} free. Free some "
            "space, or give an --out on another disk."
        )


@contextmanager
def complete_or_absent(target: Path) -> Iterator[Path]:
    """An empty folder beside `target`, which becomes it if the block ends without an error.

    Raises:
        ExportError: The disk is full or the folder cannot be written; nothing is left of it.
    """
    try:
        with whole_folder(target) as aside:
            yield aside
    except BaseException as error:
        if _is_full(error):
            raise ExportError(
                f"The disk of {target} is full: the export was removed again. Free some space, or "
                "give an --out on another disk."
            ) from error
        if isinstance(error, PermissionError):
            raise ExportError(
                f"{target} cannot be written ({error}). Give another --out."
            ) from error
        raise


def _is_full(error: BaseException) -> bool:
    # safetensors reports what the system said in words.
    number = getattr(error, "errno", None)
    return number == errno.ENOSPC or f"os error {errno.ENOSPC})" in str(error)
