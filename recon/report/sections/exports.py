"""The formats a run was exported in, and what reloading each showed."""

import json
from dataclasses import dataclass
from typing import Any

from recon.report.run import Missing, Run


@dataclass(frozen=True)
class Exports:
    """What the section shows."""

    reports: list[dict[str, Any]]
    """The content of each export.json, by format."""


def build(run: Run) -> Exports | Missing:
    """The section of one run."""
    files = sorted((run.root / "exports").glob("*/export.json"))
    if not files:
        return Missing("The run was not exported yet.", run.command("export", "--format native"))
    return Exports([json.loads(file.read_text(encoding="utf-8")) for file in files])
