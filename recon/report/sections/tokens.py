"""Where the attention goes by which S²Q-VDiT's loss weighs tokens, frame by frame."""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup
from safetensors.torch import load_file

from recon.report.maps import frames_map
from recon.report.run import Missing, Run

FILE = "salience.safetensors"
SHOWN = 6
"""Units, at most; the first and the last are among them."""


@dataclass(frozen=True)
class Picture:
    """Attention that the tokens of a unit's video receive, over the mean of all tokens."""

    unit: str
    drawing: Markup
    lowest: float
    highest: float


@dataclass(frozen=True)
class Tokens:
    """What the section shows."""

    pictures: list[Picture]
    frames: int
    units: int
    """That have a picture, shown or not."""


def build(run: Run) -> Tokens | Missing | None:
    """The section of one run; None where the method weighs no tokens."""
    file = run.root / FILE
    if file.is_file():
        found = load_file(file)
        names = sorted(found)
        shown = [names[place] for place in _spread(len(names))]
        return Tokens(
            [_picture(run, name, found[name].tolist()) for name in shown],
            len(found[names[0]]),
            len(names),
        )
    if run.method != "S2QVDiT":
        return None
    return Missing(
        f"{FILE} is not in the run folder: no unit has been closed yet, token weights are off "
        "(model.std.lambda_min equals model.std.lambda_max), or the run was fitted before such "
        "pictures were kept."
    )


def _spread(count: int) -> list[int]:
    """Some of the places 0 … count-1, evenly spaced, both ends among them."""
    if count <= SHOWN:
        return list(range(count))
    return [round(n * (count - 1) / (SHOWN - 1)) for n in range(SHOWN)]


def _picture(run: Run, key: str, frames: Sequence[Sequence[Sequence[float]]]) -> Picture:
    number = int(key.removeprefix("unit="))
    name = run.units[number].label if number < len(run.units) else ""
    values = [value for frame in frames for row in frame for value in row]
    title = name or f"unit {number}"
    drawing = frames_map(f"Attention that tokens receive in {title}", frames)
    return Picture(title, drawing, min(values), max(values))
