"""Maps of values: a cell for each, of a stronger colour where it is high."""

from collections.abc import Mapping, Sequence

from markupsafe import Markup

from recon.report.axes import whole_marks
from recon.report.charts import WIDTH, Chart

LEVELS = 7
"""Shades; each holds an equal share of the cells, whatever the scores' distribution."""
_TALLEST = 16.0
"""Units; height of a row of few."""
_BESIDE = 5
"""Frames in a row, at most; rows hold as many each as can be."""

Cell = tuple[int, int]


def score_map(
    chart_title: str,
    values: Mapping[Cell, float],
    chosen: Sequence[Cell],
    shape: tuple[int, int],
    labels: tuple[str, str],
) -> Markup:
    """Cells by (row, column), those chosen with a dot.

    Args:
        chart_title: For screen readers.
        values: Score of each cell that has one.
        chosen: Cells that were chosen.
        shape: Rows and columns.
        labels: What rows and columns are.
    """
    rows, columns = shape
    left, right, top = 34.0, WIDTH - 4.0, 4.0
    wide = (right - left) / columns
    high = min(_TALLEST, max(3.0, 300.0 / rows))
    bottom = top + rows * high
    chart = Chart(chart_title, labels[1], labels[0], height=bottom + 30)
    parts = [
        f'<path class="h{level}" d="{_cells(cells, left, top, wide, high)}"/>'
        for level, cells in enumerate(_levels(values))
        if cells
    ]
    radius = min(wide, high) * 0.3
    dots = "".join(
        f'<circle cx="{left + (c + 0.5) * wide:.1f}" cy="{top + (r + 0.5) * high:.1f}" '
        f'r="{radius:.1f}"/>'
        for r, c in chosen
    )
    parts.append(f'<g class="chosen">{dots}</g>')
    parts += [_tick(left + (n + 0.5) * wide, bottom + 12, n) for n in whole_marks(columns, 8)]
    shown = whole_marks(rows, max(2, int((bottom - top) / 14)))
    parts += [_tick(left - 9, top + (n + 0.5) * high + 3.5, n) for n in shown]
    parts.append(_label((left + right) / 2, bottom + 26, labels[1]))
    parts.append(
        f'<text class="label" text-anchor="middle" transform="translate(9 {(top + bottom) / 2:g}) '
        f'rotate(-90)">{labels[0]}</text>'
    )
    return chart.drawn(parts)


def frames_map(chart_title: str, frames: Sequence[Sequence[Sequence[float]]]) -> Markup:
    """Frames side by side, some to a row, of a stronger colour where values are high.

    Args:
        chart_title: For screen readers.
        frames: Values by frame, row and column; all frames share their shades.
    """
    tall, wide = len(frames[0]) + 1, len(frames[0][0]) + 1  # and a gap
    lines = -(-len(frames) // _BESIDE)
    beside = -(-len(frames) // lines)
    values = {
        (n // beside * tall + row, n % beside * wide + column): value
        for n, frame in enumerate(frames)
        for row, cells in enumerate(frame)
        for column, value in enumerate(cells)
    }
    cell = WIDTH / (beside * wide - 1)
    height = cell * (lines * tall - 1)
    parts = [
        f'<path class="h{level}" d="{_cells(cells, 0.0, 0.0, cell, cell)}"/>'
        for level, cells in enumerate(_levels(values))
        if cells
    ]
    return Chart(chart_title, "", "", height=round(height, 2)).drawn(parts)


def _levels(values: Mapping[Cell, float]) -> list[list[Cell]]:
    """Cells by shade, lowest first; equal scores are in one shade."""
    ordered = sorted(set(values.values()))
    ranks = {value: n for n, value in enumerate(ordered)}
    levels: list[list[Cell]] = [[] for _ in range(LEVELS)]
    for cell, value in sorted(values.items()):
        levels[ranks[value] * LEVELS // len(ordered)].append(cell)
    return levels


def _cells(cells: Sequence[Cell], left: float, top: float, wide: float, high: float) -> str:
    """One path for all cells of a shade: a tenth of the size of as many rectangles."""
    # A little overlap: neighbours of one shade must not show a seam.
    shape = f"h{wide + 0.1:.2f}v{high + 0.1:.2f}h-{wide + 0.1:.2f}z"
    return "".join(f"M{left + c * wide:.1f} {top + r * high:.1f}{shape}" for r, c in cells)


def _tick(x: float, y: float, text: object) -> str:
    return f'<text class="tick" x="{x:.1f}" y="{y:.1f}" text-anchor="middle">{text}</text>'


def _label(x: float, y: float, text: str) -> str:
    return f'<text class="label" x="{x:.1f}" y="{y:.1f}" text-anchor="middle">{text}</text>'
