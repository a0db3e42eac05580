"""Charts as inline SVG; colours are classes, so that one drawing serves light, dark and print."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup, escape

from recon.report.axes import Axis, whole_marks

WIDTH = 360
"""Units of a drawing: about the pixels of a phone, so that letters keep their size there."""
SMALL = 180
"""Of one of several small drawings beside each other."""
_LEFT, _RIGHT, _TOP, _BOTTOM = 52.0, 8.0, 8.0, 30.0
POINTS = 120
"""Of a curve; longer ones are thinned to the means of as many equal pieces."""

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """A line of a chart; `style` is its number among the page's colours."""

    label: str
    points: Sequence[Point]
    style: int
    dots: bool = False


@dataclass(frozen=True)
class Chart:
    """The plane of a drawing and what is written around it."""

    title: str
    """Read out by screen readers; the caption in the page says the same at length."""
    x_label: str
    y_label: str
    width: float = WIDTH
    height: float = 190.0

    @property
    def columns(self) -> tuple[float, float]:
        """Left and right end of the plane."""
        return _LEFT, self.width - _RIGHT

    @property
    def rows(self) -> tuple[float, float]:
        """Lower and upper end of the plane."""
        return self.height - _BOTTOM, _TOP

    def drawn(self, parts: Sequence[str]) -> Markup:
        """The drawing of `parts`."""
        box = f"0 0 {self.width:g} {self.height:g}"
        head = f'<svg class="chart" viewBox="{box}" role="img" aria-label="{escape(self.title)}">'
        return Markup("\n".join([head, *parts, "</svg>"]))

    def frame(self, across: Sequence[tuple[float, str]], up: Axis, most: int = 5) -> list[str]:
        """Rules, marks and labels: `across` are pixels and their texts."""
        (left, right), (bottom, _) = self.columns, self.rows
        parts = []
        for value, text in up.marks(most):
            y = up(value)
            parts.append(f'<path class="rule" d="M{left} {y}H{right}"/>')
            parts.append(_text(left - 5, y + 3.5, text, "end"))
        parts += [_text(x, bottom + 13, text, "middle") for x, text in across]
        parts.append(_text((left + right) / 2, self.height - 4, self.x_label, "middle", "label"))
        middle = (bottom + _TOP) / 2
        parts.append(
            f'<text class="label" text-anchor="middle" transform="translate(9 {middle:g}) '
            f'rotate(-90)">{escape(self.y_label)}</text>'
        )
        return parts


def lines(
    chart: Chart,
    series: Sequence[Series],
    *,
    up: Axis | None = None,
    log: bool = False,
    whole: bool = False,
) -> Markup:
    """Lines over a common plane.

    Args:
        chart: What is written around it.
        series: Those that have points are drawn; where `log`, points that are not positive are
            left out.
        up: The vertical axis; None: one that holds all points.
        log: Whether that axis is logarithmic.
        whole: Whether places across are whole numbers from 0.
    """
    kept = [(s, [p for p in s.points if p[1] > 0 or not log]) for s in series]
    kept = [(s, points) for s, points in kept if points]
    if not kept:
        return Markup("")
    if up is None:
        up = Axis.over((y for _, points in kept for _, y in points), *chart.rows, log=log)
    xs = [x for _, points in kept for x, _ in points]
    across = Axis.over(xs, *chart.columns)
    marks = whole_marks(int(max(xs)) + 1) if whole else None
    shown = [(across(n), str(n)) for n in marks] if marks else _pixels(across, chart)
    parts = chart.frame(shown, up)
    for each, points in kept:
        thin = _thinned(points)
        path = "L".join(f"{across(x):g} {up(y):g}" for x, y in thin)
        parts.append(f'<path class="line c{each.style}" d="M{path}"/>')
        if each.dots or len(thin) == 1:  # no line goes through one point
            parts += [
                f'<circle class="dot c{each.style}" cx="{across(x):g}" cy="{up(y):g}" r="2.6"/>'
                for x, y in thin
            ]
    return chart.drawn(parts)


def bars(
    chart: Chart, values: Sequence[float | None], styles: Sequence[int], rule: float | None = None
) -> Markup:
    """A bar for each value, from zero; None leaves its place empty.

    Args:
        chart: What is written around it.
        values: At least one that is not None.
        styles: Of each bar.
        rule: A value marked by a dashed line.
    """
    known = [0.0, *(v for v in values if v is not None), *([] if rule is None else [rule])]
    up = Axis(min(known), max(known) * 1.06 or 1.0, *chart.rows)
    place, pitch = _places(chart, len(values))
    parts = chart.frame([(place(n), str(n)) for n in whole_marks(len(values), 7)], up)
    wide = min(max(pitch * 0.72, 0.8), 28.0)
    for n, (value, style) in enumerate(zip(values, styles, strict=True)):
        if value is not None:
            top, bottom = sorted((up(value), up(0.0)))
            x = place(n) - wide / 2
            parts.append(
                f'<rect class="bar c{style}" x="{x:.2f}" y="{top:g}" width="{wide:.2f}" '
                f'height="{bottom - top:.2f}"/>'
            )
    if rule is not None:
        left, right = chart.columns
        parts.append(f'<path class="mark" d="M{left} {up(rule):g}H{right}"/>')
    return chart.drawn(parts)


def bands(chart: Chart, rows: Sequence[tuple[float, ...]], up: Axis) -> Markup:
    """Values of each place across: a band from the smallest to the largest, a line at the middle.

    Args:
        chart: What is written around it.
        rows: Smallest, middle and largest value; or two, of which none is a middle.
        up: The vertical axis.
    """
    place, pitch = _places(chart, len(rows))
    parts = chart.frame([(place(n), str(n)) for n in whole_marks(len(rows), 4)], up, most=4)
    half = min(pitch * 0.28, 5.0)
    for n, values in enumerate(rows):
        x, top, bottom = place(n), up(max(values)), up(min(values))
        parts.append(
            f'<rect class="band" x="{x - half:.2f}" y="{top:g}" width="{2 * half:.2f}" '
            f'height="{max(bottom - top, 1.6):.2f}" rx="0.8"/>'
        )
        if len(values) > 2:
            y = up(values[1])
            parts.append(f'<path class="line c1" d="M{x - half:.2f} {y:g}H{x + half:.2f}"/>')
    return chart.drawn(parts)


def strip(chart: Chart, rows: Sequence[tuple[str, Sequence[float], Point | None]]) -> Markup:
    """A row of dots for each label, with its mean and the interval of that mean.

    Args:
        chart: What is written around it.
        rows: Label, values and interval; the last row is the accented one.
    """
    (left, right), (bottom, top) = (92.0, chart.width - _RIGHT), chart.rows
    across = Axis.over((v for _, values, _ in rows for v in values), left, right)
    parts = []
    for value, text in across.marks(5):
        x = across(value)
        parts += [
            f'<path class="rule" d="M{x:g} {top}V{bottom}"/>',
            _text(x, bottom + 13, text, "middle"),
        ]
    parts.append(_text((left + right) / 2, chart.height - 4, chart.x_label, "middle", "label"))
    pitch = (bottom - top) / len(rows)
    for n, (label, values, interval) in enumerate(rows):
        y, style = top + pitch * (n + 0.5), 1 if n == len(rows) - 1 else 0
        parts.append(_text(left - 6, y + 3.5, label, "end"))
        parts += [
            f'<circle class="many c{style}" cx="{across(v):g}" cy="{y:g}" r="3"/>' for v in values
        ]
        if interval:
            low, high = (across(v) for v in interval)
            parts.append(f'<path class="interval" d="M{low:g} {y + 11:g}H{high:g}"/>')
        mean = across(sum(values) / len(values))
        parts.append(f'<path class="mean" d="M{mean:g} {y - 11:g}V{y + 13:g}"/>')
    return chart.drawn(parts)


def _places(chart: Chart, count: int) -> tuple[Callable[[int], float], float]:
    """Middle of each of `count` places across, and their width."""
    left, right = chart.columns
    pitch = (right - left) / count
    return (lambda n: round(left + pitch * (n + 0.5), 2)), pitch


def _pixels(axis: Axis, chart: Chart) -> list[tuple[float, str]]:
    return [(axis(value), text) for value, text in axis.marks(5 if chart.width > SMALL else 3)]


def _thinned(points: Sequence[Point]) -> Sequence[Point]:
    if len(points) <= POINTS:
        return points
    edges = [round(n * len(points) / POINTS) for n in range(POINTS + 1)]
    pieces = [points[a:b] for a, b in pairwise(edges)]
    return [
        (sum(x for x, _ in piece) / len(piece), sum(y for _, y in piece) / len(piece))
        for piece in pieces
    ]


def _text(x: float, y: float, text: str, anchor: str, kind: str = "tick") -> str:
    return f'<text class="{kind}" x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escape(text)}</text>'
