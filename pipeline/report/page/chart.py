"""Charts as inline SVG: lines over two axes, with bands, bars and marks, in the colours of the page, light or dark."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from pipeline.report.page.html import Markup, tag

COLOURS = 6  # that the style sheet knows
_DASHES = ("none", "7 3", "2 3", "9 3 2 3")  # once the colours are used up
_WIDTH, _HEIGHT = 400, 330
_LEFT, _TOP, _RIGHT, _BOTTOM = 52, 12, 388, 284  # edges of the plot
_PIXEL = 0.05  # of the drawing: points that change a line by less are left out

Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """A line of a chart.

    Attributes:
        name: For the legend.
        points: (x, y), in order.
        sizes: Radius of a dot at each point; empty for none.
        bars: Low and high end of an upright bar at each point; empty for none.
        band: (x, low, high), in order, of an area around the line; empty for none.
    """

    name: str
    points: Sequence[Point]
    sizes: Sequence[float] = ()
    bars: Sequence[Point] = ()
    band: Sequence[tuple[float, float, float]] = ()


@dataclass(frozen=True)
class Spot:
    """A place on a chart that has a name, drawn as a shape of its own.

    Attributes:
        name: For the legend.
        at: (x, y).
    """

    name: str
    at: Point


@dataclass(frozen=True)
class Axis:
    """What runs along one side of a chart.

    Attributes:
        label: What it shows.
        low: Where it begins.
        high: Where it ends.
        whole: Whether only whole numbers are marked.
    """

    label: str
    low: float = 0.0
    high: float = 1.0
    whole: bool = False

    def ticks(self) -> list[float]:
        """Give about five round values within the axis."""
        span = self.high - self.low
        raw = span / 5
        magnitude = 10 ** math.floor(math.log10(raw))
        step = next(m * magnitude for m in (1, 2, 2.5, 5, 10) if m * magnitude >= raw * (1 - 1e-9))
        step = max(step, 1.0) if self.whole else step
        step = math.ceil(step) if self.whole else step
        first = math.ceil(self.low / step - 1e-9)
        return [number * step for number in range(first, math.floor(self.high / step + 1e-9) + 1)]

    def place(self, value: float, start: float, end: float) -> float:
        """Map a value onto the drawing."""
        return start + (value - self.low) / (self.high - self.low) * (end - start)


def chart(
    lines: Sequence[Line],
    across: Axis,
    up: Axis,
    *,
    alt: str,
    diagonal: bool = False,
    mark: float | None = None,
    spots: Sequence[Spot] = (),
    level: float | None = None,
) -> Markup:
    """Draw lines over two axes; what leaves the axes is cut off.

    Args:
        lines: At least one.
        across: The horizontal axis.
        up: The vertical axis.
        alt: What the chart shows, in words and numbers.
        diagonal: Draw what chance, or perfect calibration, would be.
        mark: Where a vertical line stands.
        spots: Places to mark.
        level: Where a horizontal line stands.
    """
    parts = [*_grid(across, up)]
    if diagonal:
        parts.append(tag("line", x1=_LEFT, y1=_BOTTOM, x2=_RIGHT, y2=_TOP, class_="reference"))
    if level is not None:
        y = _number(up.place(level, _BOTTOM, _TOP))
        parts.append(tag("line", x1=_LEFT, y1=y, x2=_RIGHT, y2=y, class_="reference"))
    if mark is not None:
        x = _number(across.place(mark, _LEFT, _RIGHT))
        parts.append(tag("line", x1=x, y1=_TOP, x2=x, y2=_BOTTOM, class_="mark"))
    drawn = [part for number, line in enumerate(lines) for part in _line(number, line, across, up)]
    parts.append(_cut(drawn))
    for number, spot in enumerate(spots):
        at = (across.place(spot.at[0], _LEFT, _RIGHT), up.place(spot.at[1], _BOTTOM, _TOP))
        parts.append(_shape(number, at))
    return tag("svg", *parts, viewBox=f"0 0 {_WIDTH} {_HEIGHT}", role="img", aria_label=alt)


def legend(
    names: Iterable[str], *, reference: str = "", mark: str = "", spots: Iterable[str] = (), band: str = ""
) -> Markup:
    """Name the lines of a chart, in HTML, so that long names wrap."""

    def stroke(**style: str) -> Markup:
        return tag("line", x1=0, y1=7, x2=26, y2=7, **style)

    entries = [
        (name, stroke(class_=f"line c{number % COLOURS}", stroke_dasharray=_dash(number)))
        for number, name in enumerate(names)
    ]
    if band:
        entries.append((band, tag("rect", x=0, y=1, width=26, height=12, class_="band c0")))
    entries += [(name, stroke(class_=kind)) for name, kind in ((reference, "reference"), (mark, "mark")) if name]
    entries += [(name, _shape(number, (13, 7))) for number, name in enumerate(spots)]
    return tag(
        "ul",
        *(
            tag("li", tag("svg", drawn, viewBox="0 0 26 14", aria_hidden="true"), tag("span", name))
            for name, drawn in entries
        ),
        class_="legend",
    )


def _cut(drawn: Iterable[Markup]) -> Markup:
    """What lies within the axes of something drawn."""
    width, height = _RIGHT - _LEFT, _BOTTOM - _TOP
    room = 6  # for the width of lines and dots at the edges
    box = (_LEFT - room, _TOP - room, width + 2 * room, height + 2 * room)
    places = dict(zip(("x", "y", "width", "height"), box, strict=True))
    return tag("svg", *drawn, viewBox=" ".join(map(str, box)), aria_hidden="true", **places)


def _shape(number: int, at: Point) -> Markup:
    """A hollow mark: a disc, a square, a triangle, a diamond."""
    x, y = at
    corners = (
        [],
        [(-5, -5), (5, -5), (5, 5), (-5, 5)],
        [(0, -6.5), (6, 5), (-6, 5)],
        [(0, -6.5), (6.5, 0), (0, 6.5), (-6.5, 0)],
    )[number % 4]
    if not corners:
        return tag("circle", cx=_number(x), cy=_number(y), r=5, class_="spot")
    return tag("polygon", points=" ".join(f"{_number(x + a)},{_number(y + b)}" for a, b in corners), class_="spot")


def _grid(across: Axis, up: Axis) -> Iterable[Markup]:
    for value in across.ticks():
        x = _number(across.place(value, _LEFT, _RIGHT))
        yield tag("line", x1=x, y1=_TOP, x2=x, y2=_BOTTOM, class_="grid")
        yield tag("text", _value(value), x=x, y=_BOTTOM + 17, text_anchor="middle")
    for value in up.ticks():
        y = _number(up.place(value, _BOTTOM, _TOP))
        yield tag("line", x1=_LEFT, y1=y, x2=_RIGHT, y2=y, class_="grid")
        yield tag("text", _value(value), x=_LEFT - 7, y=y, dy="0.35em", text_anchor="end")
    middle = (_TOP + _BOTTOM) / 2
    yield tag("text", across.label, x=(_LEFT + _RIGHT) / 2, y=_HEIGHT - 8, text_anchor="middle", class_="axis")
    turned = f"rotate(-90 13 {middle})"
    yield tag("text", up.label, x=13, y=middle, dy="0.35em", transform=turned, text_anchor="middle", class_="axis")


def _line(number: int, line: Line, across: Axis, up: Axis) -> Iterable[Markup]:
    places = [(across.place(x, _LEFT, _RIGHT), up.place(y, _BOTTOM, _TOP)) for x, y in line.points]
    kind = f"c{number % COLOURS}"
    if line.band:
        edges = [
            [(across.place(x, _LEFT, _RIGHT), up.place(ends[side], _BOTTOM, _TOP)) for x, *ends in line.band]
            for side in (0, 1)
        ]
        outline = [*edges[0], *reversed(edges[1])]
        path = "L".join(f"{_number(x)} {_number(y)}" for x, y in outline)
        yield tag("path", d=f"M{path}Z", class_=f"band {kind}")
    for (x, _), ends in zip(places, line.bars, strict=False):
        low, high = (_number(up.place(end, _BOTTOM, _TOP)) for end in ends)
        yield tag("line", x1=_number(x), y1=low, x2=_number(x), y2=high, class_=f"line bar {kind}", stroke_opacity=0.5)
    path = "M" + "L".join(f"{_number(x)} {_number(y)}" for x, y in _thinned(places))
    yield tag("path", d=path, class_=f"line {kind}", stroke_dasharray=_dash(number))
    for (x, y), radius in zip(places, line.sizes, strict=False):
        yield tag("circle", cx=_number(x), cy=_number(y), r=_number(radius), class_=f"dot {kind}")


def _thinned(places: Sequence[Point]) -> list[Point]:
    """Leave out points that lie on the straight line between their neighbours."""
    kept = list(places[:1])
    for place, (x2, y2) in pairwise(places[1:]):
        (x0, y0), (x1, y1) = kept[-1], place
        length = math.hypot(x2 - x0, y2 - y0)
        away = abs((x2 - x0) * (y0 - y1) - (x0 - x1) * (y2 - y0)) / length if length else math.hypot(x1 - x0, y1 - y0)
        if away > _PIXEL:
            kept.append(place)
    return [*kept, *places[1:][-1:]]


def _dash(number: int) -> str:
    return _DASHES[number // COLOURS % len(_DASHES)]


def _number(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _value(value: float) -> str:
    return f"{value:.4g}"
