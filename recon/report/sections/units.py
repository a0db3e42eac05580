"""Error of each unit before and after, and the loss by which it learned."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from recon.report.axes import Axis
from recon.report.charts import SMALL, Chart, Series, lines
from recon.report.run import ClosedUnit, Missing, Run

BEFORE, AFTER = "error_before", "error_after"
LOSS = "recon/loss"

Row = dict[str, float]
"""What was logged at a step."""


@dataclass(frozen=True)
class Curve:
    """How one unit learned."""

    name: str
    drawing: Markup


@dataclass(frozen=True)
class Panel:
    """Curves on one axis."""

    title: str
    terms: list[tuple[str, int]]
    """Names of the curves and their colours."""
    curves: list[Curve]


@dataclass(frozen=True)
class Units:
    """What the section shows."""

    units: list[ClosedUnit]
    extras: list[str]
    """Further results that units have, as columns."""
    errors: Markup
    curves: list[Panel]
    """Of what learned before there were units, if anything did, and of the units."""


def build(run: Run) -> Units | Missing:
    """The section of one run."""
    if not run.units:
        return Missing("No unit has been closed yet.", run.command("fit"))
    extras = dict.fromkeys(name for unit in run.units for name in unit.results)
    ahead, steps = _split(run)
    encoder = ClosedUnit("visual encoder", (), 0, run.units[0].last, {})
    panels = (
        _panel("Loss before there were units", ahead, [encoder]),
        _panel("Loss while each unit learned", steps, run.units),
    )
    return Units(
        run.units,
        [name for name in extras if name not in (BEFORE, AFTER)],
        _errors(run.units),
        [panel for panel in panels if panel.curves],
    )


def _errors(units: Sequence[ClosedUnit]) -> Markup:
    chart = Chart("Error behind each unit, round to nearest and reconstructed", "unit", "error")
    series = [
        Series(label, [(float(n), unit.results[key]) for n, unit in enumerate(units)], style, True)
        for style, (label, key) in enumerate(
            (("round to nearest", BEFORE), ("reconstructed", AFTER))
        )
    ]
    return lines(chart, series, log=True, whole=True)


def _split(run: Run) -> tuple[list[Row], list[Row]]:
    """Logged steps of what learned before there were units, and those of the units.

    Both stand before the first unit was closed; terms that no later unit has are the former's.
    """
    rows = [row for row in run.steps if LOSS in row]
    first = run.units[0].last
    own = {name for row in rows if row["step"] >= first for name in row}

    def ahead(row: Row) -> bool:
        return bool(own) and row["step"] < first and not row.keys() <= own

    return [row for row in rows if ahead(row)], [row for row in rows if not ahead(row)]


def _terms(rows: Sequence[Row]) -> list[str]:
    """The loss and its terms; a term that is all of it is left out."""
    names = dict.fromkeys(name for row in rows for name in row if name.startswith("recon/"))
    return [name for name in names if name == LOSS or not all(_is_loss(row, name) for row in rows)]


def _is_loss(row: Row, term: str) -> bool:
    # The loss is kept in float32, its terms in float64.
    return math.isclose(row.get(term, math.nan), row[LOSS], rel_tol=1e-6)


def _panel(title: str, rows: Sequence[Row], units: Sequence[ClosedUnit]) -> Panel:
    terms = _terms(rows)
    styles = [(term.removeprefix("recon/"), style) for style, term in enumerate(terms, start=1)]
    return Panel(title, styles, _curves(rows, terms, units))


def _curves(rows: Sequence[Row], terms: Sequence[str], units: Sequence[ClosedUnit]) -> list[Curve]:
    values = [row[t] for row in rows for t in terms if row.get(t, 0.0) > 0]
    if not values:
        return []
    curves = []
    for number, unit in enumerate(units):
        inside = [row for row in rows if unit.first <= row["step"] < unit.last]
        chart = Chart(f"Loss of {unit.label or f'unit {number}'}", "step", "loss", SMALL, 128.0)
        up = Axis.over(values, *chart.rows, log=True)
        start = inside[0]["step"] if inside else 0.0
        series = [
            Series(term, [(row["step"] - start, row[term]) for row in inside if term in row], n)
            for n, term in enumerate(terms, start=1)
        ]
        drawing = lines(chart, series, up=up, log=True)
        if drawing:
            curves.append(Curve(unit.label or f"unit {number}", drawing))
    return curves
