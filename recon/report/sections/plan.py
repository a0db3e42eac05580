"""What `recon plan` foresaw, beside what the run took."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recon.report.run import Run

FOLDERS = ("calibration", "quantized")
"""Of a run, those whose size is foreseen and still there when it has ended."""
PARTS = ("calibration", "reconstruction")
"""Of a run, those whose seconds are foreseen."""


@dataclass(frozen=True)
class Amount:
    """A number of bytes or seconds."""

    name: str
    foreseen: float
    taken: float | None
    """None where the run has not ended, or keeps no such number."""


@dataclass(frozen=True)
class Plan:
    """What the section shows."""

    bytes: list[Amount]
    seconds: list[Amount]
    why_untimed: str
    exports: list[dict[str, Any]]
    """Format, bytes, and why it would be refused."""
    refusals: list[str]


def build(run: Run) -> Plan | None:
    """The section of one run; None where nothing was planned on its folder."""
    found = run.json("plan.json")
    if not found:
        return None
    return Plan(
        _bytes(run, found),
        _seconds(run, found),
        found["why_untimed"],
        found["exports"],
        found["refusals"],
    )


def _bytes(run: Run, found: dict[str, Any]) -> list[Amount]:
    peaks = run.summary.get("peak_memory_bytes", {})
    amounts = [
        Amount(f"peak memory, {place}", found["memory"][place], peaks.get(place))
        for place in ("host", "device")
        if found["memory"][place]
    ]
    files = found["disk"]["artefacts"]
    amounts += [
        Amount(f"{name}/", files[name], _size(run.root / name) if run.finished else None)
        for name in FOLDERS
    ]
    return [*amounts, Amount("disk at its fullest", found["disk_peak"], None)]


def _seconds(run: Run, found: dict[str, Any]) -> list[Amount]:
    if found["seconds"] is None:
        return []
    taken = run.summary.get("seconds", {})
    return [Amount(part, found["seconds"][part], taken.get(part)) for part in PARTS]


def _size(folder: Path) -> int | None:
    """Bytes below a folder; None where it is not there (a shared calibration set is elsewhere)."""
    if not folder.is_dir():
        return None
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
