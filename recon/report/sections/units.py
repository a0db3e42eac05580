"""Error of each unit before and after, and the loss by which it learned."""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from recon.report.axes import Axis
from recon.report.charts import SMALL, Chart, Series, lines
from recon.report.run import ClosedUnit, Missing, Run

BEFORE, AFTER = "error_before", "error_after"
LOSS = "recon/loss"


@dataclass(frozen=True)
class Curve:
    """How one unit learned."""

    name: str
    drawing: Markup


@dataclass(frozen=True)
class Units:
    """What the section shows."""

    units: list[ClosedUnit]
    extras: list[str]
    """Further results that units have, as columns."""
    errors: Markup
    curves: list[Curve]
    terms: list[tuple[str, int]]
    """Names of the curves and their colours."""


def build(run: Run) -> Units | Missing:
    """The section of one run."""
    if not run.units:
        return Missing("No unit has been closed yet.", run.command("fit"))
    extras = dict.fromkeys(name for unit in run.units for name in unit.results)
    terms = _terms(run)
    return Units(
        run.units,
        [name for name in extras if name not in (BEFORE, AFTER)],
        _errors(run.units),
        _curves(run, terms),
        [(term.removeprefix("recon/"), style) for style, term in enumerate(terms, start=1)],
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


def _terms(run: Run) -> list[str]:
    """Columns of metrics.csv with the loss and its terms; a term that is all of it is left out."""
    rows = [row for row in run.steps if LOSS in row]
    names = dict.fromkeys(name for row in rows for name in row if name.startswith("recon/"))
    return [
        name for name in names if name == LOSS or any(row.get(name) != row[LOSS] for row in rows)
    ]


def _curves(run: Run, terms: Sequence[str]) -> list[Curve]:
    values = [row[t] for row in run.steps for t in terms if row.get(t, 0.0) > 0]
    if not values:
        return []
    curves = []
    for number, unit in enumerate(run.units):
        rows = [row for row in run.steps if unit.first <= row["step"] < unit.last]
        chart = Chart(f"Loss of unit {number}", "step", "loss", SMALL, 128.0)
        up = Axis.over(values, *chart.rows, log=True)
        series = [
            Series(term, [(row["step"] - unit.first, row[term]) for row in rows if term in row], n)
            for n, term in enumerate(terms, start=1)
        ]
        drawing = lines(chart, series, up=up, log=True)
        if drawing:
            curves.append(Curve(unit.name or f"unit {number}", drawing))
    return curves
