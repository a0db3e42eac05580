"""What the evaluation measured: of each model alone, and against full precision."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from recon.report.charts import Chart, Point, strip
from recon.report.run import Missing, Run

MODELS = {
    "full_precision": ("full precision", ""),
    "round_to_nearest": ("round to nearest", "paired_round_to_nearest"),
    "quantized": ("quantised", "paired"),
}
"""Name of each model, and the part that pairs it with full precision."""
LABELS = {
    "psnr": "PSNR, dB",
    "ssim": "SSIM",
    "lpips": "LPIPS",
    "fid": "FID",
    "kid": "KID",
    "kid_std": "KID, standard deviation",
    "kl": "KL divergence, nats",
    "kl_median": "KL, median question",
}
"""Of numbers whose name is no plain words."""


@dataclass(frozen=True)
class Cell:
    """A number, its interval where it has one."""

    value: float | int | str | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Table:
    """Numbers of some models."""

    title: str
    columns: list[str]
    rows: dict[str, list[Cell]]


@dataclass(frozen=True)
class Metrics:
    """What the section shows."""

    tables: list[Table]
    count: int
    """Samples that were measured."""
    spread: Markup
    """PSNR of every sample."""
    definitions: dict[str, str]
    settings: dict[str, Any]


def build(run: Run) -> Metrics | Missing:
    """The section of one run."""
    found = run.evaluation
    if not found:
        return Missing("The run was not tested yet.", run.command("test"))
    pairs = {model: found[part] for model, part in MODELS.values() if part in found}
    models = {model: found[key] for key, (model, _) in MODELS.items() if key in found}
    settings = dict(found.get("settings", {}))
    definitions = settings.pop("definitions", {})
    return Metrics(
        [_table("against full precision", pairs), _table("each model alone", models)],
        found["full_precision"]["count"],
        _spread(found),
        {label(name): text for name, text in definitions.items()},
        settings,
    )


def _table(title: str, parts: Mapping[str, Mapping[str, Any]]) -> Table:
    """A row per number that a part has, a cell per part; an interval stands with its number."""
    names = dict.fromkeys(name for part in parts.values() for name in part)
    rows = {
        label(name): [_cell(part, name) for part in parts.values()]
        for name in names
        if name != "count"
        and not name.endswith("_interval")
        and any(part.get(name) is not None for part in parts.values())
    }
    return Table(title, list(parts), rows)


def label(name: str) -> str:
    """What a number is called in the page."""
    return LABELS.get(name, name.replace("_", " "))


def _cell(part: Mapping[str, Any], name: str) -> Cell:
    low, high = part.get(f"{name}_interval") or (None, None)
    return Cell(part.get(name), low, high)


def _spread(found: Mapping[str, Any]) -> Markup:
    rows: list[tuple[str, list[float], Point | None]] = []
    for name, part in MODELS.values():
        values = [
            float(row[part]["psnr"])
            for row in found.get("samples", [])
            if row.get(part, {}).get("psnr") is not None
        ]
        if values:
            interval = found[part].get("psnr_interval")
            rows.append((name, values, tuple(interval) if interval else None))
    if not rows:
        return Markup("")
    height = 44.0 + 34 * len(rows)
    return strip(Chart("PSNR of every sample", "paired PSNR, dB", "", height=height), rows)
