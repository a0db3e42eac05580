"""Files and folders that are there whole or not at all, whenever the process dies.

Each is written beside its place, under a name that begins with `.partial.`, and renamed. What a
killed process left is overwritten by the next one that writes the same.
"""

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PARTIAL = ".partial."
"""How the names of what is being written begin."""


@contextmanager
def whole_file(path: Path, writer: str = "") -> Iterator[Path]:
    """Another name for a file, which becomes `path` if the block ends without an error.

    Args:
        path: The file; one that is there is replaced. Its folder is made if it is missing.
        writer: Tells apart processes that may write the same file at the same time.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # The end of the name is kept: there are writers that choose the format by it.
    aside = path.with_name(f"{PARTIAL}{writer}{path.name}")
    try:
        aside.touch()
        mode = aside.stat().st_mode
        yield aside
        aside.chmod(mode)  # safetensors writes for the owner alone, whatever the umask says
        with aside.open("rb") as file:
            os.fsync(file.fileno())  # the name must not reach the disk before the content
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """An empty folder, which becomes `path` if the block ends without an error.

    One that is there is moved away before, and deleted last.
    """
    aside, old = (path.with_name(f"{kind}{path.name}") for kind in (PARTIAL, ".old."))
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        mode = aside.stat().st_mode & 0o666
        yield aside
        for file in aside.rglob("*"):
            if file.is_file():
                file.chmod(mode)  # as in `whole_file`
        shutil.rmtree(old, ignore_errors=True)
        if path.exists():
            os.replace(path, old)
        os.replace(aside, path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a file of JSON; NaN and Inf, which JSON does not have, become null."""
    text = json.dumps(_finite(content), indent=1, ensure_ascii=False, allow_nan=False)
    with whole_file(path) as aside:
        aside.write_text(text + "\n", encoding="utf-8")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _finite(part) for name, part in value.items()}
    return [_finite(part) for part in value] if isinstance(value, list | tuple) else value
