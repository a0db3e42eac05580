"""Step sizes of weights, scales of input channels, and what is kept of the inputs' ranges."""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup
from safetensors import safe_open
from torch import Tensor

from recon.engine.native import Native
from recon.report.axes import Axis
from recon.report.charts import SMALL, Chart, bands
from recon.report.run import Missing, Run
from recon.report.sections.layers import inside_block

Numbers = tuple[float, ...]
"""Of one tensor: smallest, middle and largest value; of a clip its two shares."""
SPREAD = "min · median · max"


@dataclass(frozen=True)
class Kind:
    """One sort of tensor: where it is stored and how it is shown."""

    key: str
    """Of the tensor, behind the layer's name."""
    title: str
    caption: str
    label: str
    log: bool
    numbers: str = SPREAD
    """What the numbers of a layer are."""


KINDS = (
    Kind(
        "scale",
        "Step sizes of weights",
        "Smallest, median and largest step of each layer, in units of the (transformed) weight; "
        "logarithmic.",
        "step",
        True,
    ),
    Kind(
        "activation_clip",
        "Kept share of the inputs' ranges",
        "From one to the other of two shares: of a token's maximum and of its minimum, that the "
        "grid reaches to; 1: nothing is clipped.",
        "share",
        False,
        "of the maximum · of the minimum",
    ),
    Kind(
        "transform.channel_scale",
        "Channel scales of inputs",
        "What input channels are multiplied by before they are rounded (weights are divided by "
        "it): smallest, median and largest; logarithmic.",
        "scale",
        True,
    ),
    Kind(
        "transform.static.step",
        "Steps of fixed input ranges",
        "Step of the grid that inputs are rounded on, in units of the (transformed) input; "
        "logarithmic.",
        "step",
        True,
    ),
)


@dataclass(frozen=True)
class Panel:
    """Layers of one name, over the blocks."""

    name: str
    drawing: Markup


@dataclass(frozen=True)
class Group:
    """One sort of tensor in all layers that have it."""

    kind: Kind
    panels: list[Panel]


@dataclass(frozen=True)
class Scales:
    """What the section shows."""

    groups: list[Group]
    table: list[tuple[str, list[Numbers | None]]]
    """Every layer, and its numbers of each group."""


def build(run: Run) -> Scales | Missing:
    """The section of one run."""
    if run.native is None:
        return Missing("Scales are written when the run has ended.", run.command("fit"))
    found = {kind.key: _numbers(run.native, kind) for kind in KINDS}
    kinds = [kind for kind in KINDS if found[kind.key]]
    return Scales(
        [Group(kind, _panels(run.native, kind, found[kind.key])) for kind in kinds],
        [
            (name, [found[kind.key].get(name) for kind in kinds])
            for name in run.native.manifest["layers"]
        ],
    )


def _numbers(native: Native, kind: Kind) -> dict[str, Numbers]:
    """Numbers of every layer that has the tensor, read one tensor at a time."""
    found: dict[str, Numbers] = {}
    with safe_open(native.folder / "quantized.safetensors", "pt") as file:
        stored = set(file.keys())
        for layer in native.manifest["layers"]:
            if f"{layer}.{kind.key}" in stored:
                values = file.get_tensor(f"{layer}.{kind.key}").float().flatten()
                found[layer] = _spread(values) if kind.numbers == SPREAD else tuple(values.tolist())
    return found


def _spread(values: Tensor) -> Numbers:
    """Smallest, middle (of an even number the lower of both) and largest value."""
    return float(values.min()), float(values.median()), float(values.max())


def _panels(native: Native, kind: Kind, found: dict[str, Numbers]) -> list[Panel]:
    by_name: dict[str, list[Numbers]] = {}
    for layer, numbers in found.items():
        by_name.setdefault(inside_block(native, layer)[1], []).append(numbers)
    return [Panel(name, _drawn(kind, name, rows, found)) for name, rows in by_name.items()]


def _drawn(kind: Kind, name: str, rows: Sequence[Numbers], found: dict[str, Numbers]) -> Markup:
    chart = Chart(f"{kind.title}, {name}", "block", kind.label, SMALL, 118.0)
    log = kind.log and all(min(numbers) > 0 for numbers in found.values())
    # One axis for all panels: layers are there to be compared.
    up = Axis.over((v for numbers in found.values() for v in numbers), *chart.rows, log=log)
    return bands(chart, rows, up)
