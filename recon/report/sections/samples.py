"""Samples of the full-precision network and its quantised forms, side by side."""

import base64
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recon.report.run import Missing, Run

TYPES = {".gif": "image/gif", ".png": "image/png"}
SHEET = "_classes"
"""End of the name of the sheet of all classes."""
VERBS = ("test", "validate", "fit")
"""Beginnings of names. Each samples the same network, so one file of a prompt and seed will do:
the first of these, which has numbers."""
MOST = 64 * 2**20
"""Bytes of samples in a page, per run; a phone must still open it."""


@dataclass(frozen=True)
class Picture:
    """One file, in the page itself."""

    name: str
    caption: str
    source: str
    """As a data URI."""
    psnr: float | None
    """Of the quantised sample to the full-precision one, dB."""
    psnr_nearest: float | None


@dataclass(frozen=True)
class Samples:
    """What the section shows."""

    pictures: list[Picture]
    left_out: list[tuple[str, int]]
    """Files that would make the page too large, and their bytes."""


def build(run: Run) -> Samples | Missing:
    """The section of one run."""
    folder = run.root / "samples"
    found = [p for p in folder.glob("*") if p.suffix in TYPES and p.name[0] != "."]
    files = sorted(_once(found), key=lambda p: (p.stem.endswith(SHEET), p.name))
    if not files:
        return Missing(
            "The run folder holds no samples. Testing makes them, beside the metrics.",
            run.command("test"),
        )
    rows = run.evaluation.get("samples", [])
    pictures, left_out, room = [], [], MOST
    for file in files:
        size = file.stat().st_size
        if size > room:
            left_out.append((file.name, size))
            continue
        room -= size
        measured = file.stem.startswith(f"{run.evaluated}_")
        pictures.append(_picture(file, rows if measured else []))
    return Samples(pictures, left_out)


def _once(files: Sequence[Path]) -> list[Path]:
    """One file for each prompt and seed."""
    kept: dict[str, Path] = {}
    for file in sorted(files, key=lambda p: _rank(p.stem.partition("_")[0])):
        kept.setdefault(file.stem.partition("_")[2], file)
    return list(kept.values())


def _rank(verb: str) -> int:
    return VERBS.index(verb) if verb in VERBS else len(VERBS)


def _picture(file: Path, rows: Sequence[Mapping[str, Any]]) -> Picture:
    row = _row_of(file.stem, rows)
    encoded = base64.b64encode(file.read_bytes()).decode()
    return Picture(
        file.name,
        _caption(file.stem, row),
        f"data:{TYPES[file.suffix]};base64,{encoded}",
        row.get("paired", {}).get("psnr"),
        row.get("paired_round_to_nearest", {}).get("psnr"),
    )


def _row_of(stem: str, rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The evaluation's row of a file named VERB_prompt-in-words_SEED; empty where there is none."""
    slug, _, seed = stem.partition("_")[2].rpartition("_")
    for row in rows:
        words = re.sub(r"[^a-z0-9]+", "-", str(row.get("prompt", "")).lower()).strip("-")
        if str(row.get("seed")) == seed and words.startswith(slug):
            return row
    return {}


def _caption(stem: str, row: Mapping[str, Any]) -> str:
    if row:
        return f"{row['prompt']} (seed {row['seed']})"
    if stem.endswith(SHEET):
        return "The first picture of each class"
    verb, _, rest = stem.partition("_")
    words, _, seed = rest.rpartition("_")
    return f"{words.replace('-', ' ')} (seed {seed}, made at the end of {verb})"
