"""Error of one call of the network at each sampling step, where an evaluation measured it."""

from dataclasses import dataclass

from markupsafe import Markup

from recon.report.charts import Chart, Series, lines
from recon.report.run import Run

FORMS = (("round to nearest", "round_to_nearest"), ("reconstructed", "quantized"))
"""Legend and key of each line."""


@dataclass(frozen=True)
class StepErrors:
    """What the section shows."""

    drawing: Markup
    errors: list[dict[str, float]]
    """Of each step: its timestep and the error of each form."""
    prompts: int


def build(run: Run) -> StepErrors | None:
    """The section of one run; None where no evaluation was asked for it."""
    found = run.json("test_steps.json") or run.json("validate_steps.json")
    if not found:
        return None
    errors = found["errors"]
    chart = Chart("Error of one call at each sampling step", "sampling step", "error")
    series = [
        Series(label, [(float(step), row[key]) for step, row in enumerate(errors)], style, True)
        for style, (label, key) in enumerate(FORMS)
    ]
    return StepErrors(lines(chart, series, log=True, whole=True), errors, len(found["prompts"]))
