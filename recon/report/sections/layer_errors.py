"""The error that is each layer's own, rounded to nearest and reconstructed."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from recon.engine.native import Native
from recon.report.axes import Axis
from recon.report.charts import SMALL, Chart, Series, lines
from recon.report.run import Missing, Run
from recon.report.sections.layers import inside_block

Errors = tuple[float, float]
"""Rounded to nearest, and reconstructed."""


@dataclass(frozen=True)
class Panel:
    """Layers of one name, over the blocks."""

    name: str
    drawing: Markup


@dataclass(frozen=True)
class LayerErrors:
    """What the section shows."""

    panels: list[Panel]
    better: int
    """Layers whose error is smaller than rounded to nearest."""
    table: dict[str, Errors]
    """Of each layer that has errors, by full name."""


def build(run: Run) -> LayerErrors | Missing | None:
    """The section of one run; None where the result was written without such errors."""
    if run.native is None:
        return Missing("Errors of layers are written when the run has ended.", run.command("fit"))
    table = {
        name: (facts["error_before"], facts["error_after"])
        for name, facts in run.manifest["layers"].items()
        if "error_after" in facts
    }
    if not table:
        return None
    better = sum(after < before for before, after in table.values())
    return LayerErrors(_panels(run.native, table), better, table)


def _panels(native: Native, table: Mapping[str, Errors]) -> list[Panel]:
    by_name: dict[str, list[tuple[int, Errors]]] = {}
    for layer, errors in table.items():
        place, name = inside_block(native, layer)
        by_name.setdefault(name, []).append((place, errors))
    values = [error for errors in table.values() for error in errors if error > 0]
    return [Panel(name, _drawn(name, rows, values)) for name, rows in by_name.items() if values]


def _drawn(name: str, rows: Sequence[tuple[int, Errors]], values: Iterable[float]) -> Markup:
    chart = Chart(f"Error of {name} in each block", "block", "error", SMALL, 118.0)
    series = [
        Series(label, [(float(place), errors[which]) for place, errors in rows], which, dots=True)
        for which, label in enumerate(("round to nearest", "reconstructed"))
    ]
    # One axis for all panels: layers are there to be compared.
    return lines(chart, series, up=Axis.over(values, *chart.rows, log=True), log=True, whole=True)
