"""The page: every section of every run, rendered into one file that needs nothing else."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from recon.atomic import whole_file
from recon.report.charts import Chart, Series, lines
from recon.report.comparison import ROWS, inside
from recon.report.numbers import MISSING, measure, number, setting, size
from recon.report.run import Missing, Run
from recon.report.sections import (
    calibration,
    dependency,
    exports,
    layer_errors,
    layers,
    metrics,
    plan,
    provenance,
    samples,
    scales,
    speed,
    step_errors,
    tokens,
    units,
)

COLOURS = 3
"""Of runs in one chart; the fourth has that of the first again."""


@dataclass(frozen=True)
class Section:
    """A heading, and how its content comes from a run and is laid out."""

    key: str
    """Anchor, and name of the template."""
    title: str
    build: Callable[[Run], Any]
    """A view, `Missing`, or None where the section does not concern the run."""


SECTIONS = (
    Section("samples", "Samples", samples.build),
    Section("metrics", "Metrics", metrics.build),
    Section("step_errors", "Error at each sampling step", step_errors.build),
    Section("units", "Error and loss of each unit", units.build),
    Section("layer_errors", "Error of each layer", layer_errors.build),
    Section("layers", "What was quantised", layers.build),
    Section("scales", "Clips and scales", scales.build),
    Section("calibration", "Calibration set", calibration.build),
    Section("tokens", "Salient tokens", tokens.build),
    Section("dependency", "Dependency and partition", dependency.build),
    Section("exports", "Exports", exports.build),
    Section("speed", "Speed", speed.build),
    Section("plan", "What was planned", plan.build),
    Section("provenance", "How to repeat it", provenance.build),
)
"""In the order of the page: what a reader judges by first, then how it came about."""


def page(runs: Sequence[Run]) -> str:
    """The HTML text about one run, or several side by side.

    The same results give the same text: nothing in it depends on when it is made, and of a run's
    own times only those under the heading of times.

    Raises:
        CheckpointMismatch: A result is damaged, or its calibration set is another run's.
        CalibrationError: A calibration set is damaged.
    """
    environment = Environment(
        loader=PackageLoader("recon.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "measure": measure, "size": size, "setting": setting}
    environment.tests["missing"] = lambda view: isinstance(view, Missing)
    sections = []
    for section in SECTIONS:
        views = [(run, section.build(run)) for run in runs]
        shown = [(run, view) for run, view in views if view is not None]
        if shown:
            sections.append((section, shown))
    return environment.get_template("page.html").render(
        runs=runs, sections=sections, comparison=_comparison(runs), errors=_errors(runs)
    )


def write_page(runs: Sequence[Run], path: Path) -> None:
    """Writes the page to a file."""
    text = page(runs)
    with whole_file(path) as aside:
        aside.write_text(text, encoding="utf-8")


def _comparison(runs: Sequence[Run]) -> list[tuple[str, list[Markup]]]:
    """Rows that at least one run has; times are left to the section of times."""
    rows = []
    contents = [{"summary.json": run.summary, "test.json": run.json("test.json")} for run in runs]
    for label, file, keys, form in ROWS:
        values = [inside(content[file], keys) for content in contents]
        if keys[0] != "seconds" and any(value is not None for value in values):
            rows.append((label, [_shown(value, form) for value in values]))
    return rows


def _errors(runs: Sequence[Run]) -> Markup:
    """The units' errors of several runs in one plane, a line each."""
    series = [
        Series(
            run.name,
            [(float(n), unit.results[units.AFTER]) for n, unit in enumerate(run.units)],
            place % COLOURS + 1,
            dots=True,
        )
        for place, run in enumerate(runs)
    ]
    chart = Chart("Error behind each unit of every run", "unit", "error")
    return lines(chart, series, log=True, whole=True)


def _shown(value: Any, form: str) -> Markup:
    if value is None:
        return Markup(MISSING)
    return number(value, form) if form else Markup.escape(value)
