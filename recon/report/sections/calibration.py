"""The calibration set: which prompts and steps were chosen, and why."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from recon.calibration.artefact import CalibrationSet
from recon.report.charts import Chart, bars
from recon.report.maps import score_map
from recon.report.run import Missing, Run

SCORES = (
    ("C_diff", "Change of the latent since the step before, C_diff"),
    ("C_quant", "Norm of the tokens' Gram matrix, C_quant"),
)
"""Entries of a candidate's scores, and what they are."""


@dataclass(frozen=True)
class Calibration:
    """What the section shows."""

    counts: dict[str, int]
    rules: dict[str, Any]
    """Settings that the choice followed."""
    correlation: float | None
    """Spearman's, of both scores over all candidates."""
    maps: list[tuple[str, Markup]]
    """Title and drawing."""
    histogram: Markup
    questions: Markup
    prompts: list[str]
    """In the order of the maps' rows."""
    chosen: list[dict[str, Any]]
    """Prompt, step, scores and reason of each sample, in the order of their ranks."""


def build(run: Run) -> Calibration | Missing:
    """The section of one run."""
    found = run.calibration
    if found is None:
        if run.finished:
            return Missing(
                "Neither the run folder nor the shared folder that its configuration names holds "
                "the calibration set any more. Put it back to see it here."
            )
        return Missing("Nothing was calibrated yet.", run.command("fit"))
    details = found.details
    prompts = details.get("prompts", {}).get("calibration", [])
    scores = details.get("scores", [])
    histogram = {int(step): count for step, count in details.get("histogram", {}).items()}
    stepped = [score for score in scores if score.get("step") is not None]
    return Calibration(
        details.get("samples", {"calibration": len(found.samples)}),
        _rules(details["fingerprint"]),
        details.get("rank_correlation"),
        _maps(stepped, len(prompts), len(histogram)),
        _histogram(histogram),
        _questions([score for score in scores if "question" in score]),
        list(prompts),
        _chosen(found),
    )


def _rules(fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of the choice; the teacher's are among the versions."""
    return {k: v for k, v in fingerprint.items() if not k.startswith("teacher.")}


def _maps(
    scores: Sequence[Mapping[str, Any]], prompts: int, steps: int
) -> list[tuple[str, Markup]]:
    if not scores or not steps:
        return []
    chosen = [(s["prompt"], s["step"]) for s in scores if s["chosen"] is not None]
    drawn = []
    for key, title in SCORES:
        values = {(s["prompt"], s["step"]): float(s[key]) for s in scores if s[key] is not None}
        if values:
            shape, labels = (prompts, steps), ("prompt", "sampling step")
            drawn.append((title, score_map(title, values, chosen, shape, labels)))
    return drawn


def _histogram(histogram: Mapping[int, int]) -> Markup:
    if not histogram:
        return Markup("")
    chart = Chart("Samples chosen at each step", "sampling step", "samples", height=130.0)
    return bars(chart, [histogram[step] for step in sorted(histogram)], [1] * len(histogram))


def _questions(scores: Sequence[Mapping[str, Any]]) -> Markup:
    """Candidates without steps, the highest score first."""
    if not scores:
        return Markup("")
    ordered = sorted(scores, key=lambda s: (-s["C_quant"], s["question"]))
    chart = Chart("Score of each conversation, the chosen ones accented", "rank", "C_quant")
    styles = [0 if s["chosen"] is None else 1 for s in ordered]
    return bars(chart, [s["C_quant"] for s in ordered], styles)


def _chosen(found: CalibrationSet) -> list[dict[str, Any]]:
    return [found.samples.facts(index) for index in range(len(found.samples))]
