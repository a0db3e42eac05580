"""How much neighbouring layers depend on each other, and where the network was cut."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from markupsafe import Markup

from recon.report.charts import Chart, bars
from recon.report.run import Missing, Run

PROXIES = {
    "entropy": "conditional entropy of the next layer's states (eq. 4)",
    "quant_error": "relative error of the pair's output, both quantised",
    "ded": "share of the layer-wise error that a joint search removes",
    "entropy_image": "conditional entropy over image tokens",
    "entropy_text": "conditional entropy over text tokens",
}
"""What is measured of each pair of neighbours, and its name in the findings."""


@dataclass(frozen=True)
class Dependency:
    """What the section shows."""

    proxy: str
    drawing: Markup
    threshold: float | None
    columns: list[str]
    pairs: list[tuple[str, bool, list[float | None]]]
    """Of each pair: its blocks, whether one unit holds both, and what was measured."""
    units: list[tuple[str, ...]]
    spearman: float | None
    """Of the proxy and the true dependency, over the pairs that were audited."""


def build(run: Run) -> Dependency | Missing | None:
    """The section of one run; None where the method looks for no dependency."""
    found: dict[str, Any] = run.manifest.get("findings", {}).get("dependency", {})
    settings: dict[str, Any] = run.manifest.get("fingerprint", {})
    if not found:
        return None
    proxy = settings["model.proxy"]
    blocks = [block for unit in run.units for block in unit.blocks]
    inside = {block: n for n, unit in enumerate(run.units) for block in unit.blocks}
    joined = [inside[a] == inside[b] for a, b in pairwise(blocks)]
    columns = [name for name in PROXIES if name in found]
    threshold = _threshold(found[proxy], settings)
    return Dependency(
        proxy,
        _drawn(found[proxy], joined, threshold),
        threshold,
        columns,
        [
            (f"{a} – {b}", together, [found[name][n] for name in columns])
            for n, ((a, b), together) in enumerate(zip(pairwise(blocks), joined, strict=True))
        ],
        [unit.blocks for unit in run.units],
        found.get("spearman"),
    )


def _threshold(values: Sequence[float], settings: dict[str, Any]) -> float | None:
    """h0 of eq. 7 as the method takes it; None where the partition follows no dependency."""
    if settings["model.partition_by"] not in ("entropy", "dp"):
        return None
    quantile = settings["model.threshold_quantile"]
    if quantile is None:
        return statistics.fmean(values)
    return float(torch.tensor(values, dtype=torch.float64).quantile(quantile))


def _drawn(
    values: Sequence[float | None], joined: Sequence[bool], threshold: float | None
) -> Markup:
    title = "Dependency of each block and the next; pairs in one unit are accented"
    chart = Chart(title, "pair of blocks, by its first", "dependency", height=160.0)
    return bars(chart, values, [int(together) for together in joined], threshold)
