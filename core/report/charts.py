"""Line charts as inline SVG without scripts, legible in light, in dark and in print.

The page's style sheet gives the classes ``series0`` ... ``series5`` their colours and dashes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from xml.etree.ElementTree import Element

from triptych.core.report.markup import element

Point = tuple[float, float]

WIDTH, HEIGHT = 760.0, 320.0
LEFT, RIGHT, TOP, BOTTOM = 64.0, 22.0, 12.0, 46.0
BUCKETS = 400
"""Pieces of a long curve. The drawing keeps the lowest and the highest point of each piece."""
COLOURS = 6
NOTHING = 1e-17
"""Value in the middle of a logarithmic axis where all points are 0."""


@dataclass(frozen=True)
class Series:
    """One curve.

    Attributes:
        colour: 0 ... COLOURS - 1.
        marked: whether each point gets a dot.
    """

    name: str
    points: Sequence[Point]
    colour: int
    dashed: bool = False
    marked: bool = False

    @property
    def style(self) -> str:
        """Class names. The style sheet draws later curves thinner, so that equal ones show."""
        return f"series{self.colour % COLOURS}" + (" dashed" if self.dashed else "")


@dataclass(frozen=True)
class Level:
    """A horizontal line, labelled with its name."""

    name: str
    value: float


@dataclass(frozen=True)
class Axis:
    """Maps values to pixels.

    Attributes:
        low, high: values at the two ends.
        start, end: pixels of the two ends.
        log: whether the axis is logarithmic. Values below ``low``, e.g. 0, are drawn at ``start``.
    """

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        """Pixel of a value."""
        low, high = self.low, self.high
        if self.log:
            value, low, high = (math.log10(v) for v in (max(value, low), low, high))
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round values inside the axis."""
        if self.log:
            first, last = (round(math.log10(v)) for v in (self.low, self.high))
            stride = max(1, math.ceil((last - first) / 8))
            return [10.0**power for power in range(first, last + 1, stride)]
        return round_values(self.low, self.high)


def round_values(low: float, high: float, count: int = 5) -> list[float]:
    """About ``count`` multiples of 1, 2 or 5 times a power of ten in [low, high]."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def thinned(points: Sequence[Point]) -> list[Point]:
    """At most 2 * BUCKETS + 2 points with the same outline, the first and the last included."""
    if len(points) <= 2 * BUCKETS:
        return list(points)
    edges = [round(i * len(points) / BUCKETS) for i in range(BUCKETS + 1)]
    indices = {0, len(points) - 1}
    for start, end in pairwise(edges):
        inside = range(start, end)
        indices.add(min(inside, key=lambda i: points[i][1]))
        indices.add(max(inside, key=lambda i: points[i][1]))
    return [points[i] for i in sorted(indices)]


@dataclass(frozen=True)
class Chart:
    """One drawing.

    Attributes:
        summary: description for readers who cannot see the drawing.
        levels: horizontal lines, e.g. the chance level.
        log: whether the vertical axis is logarithmic.
    """

    title: str
    summary: str
    series: Sequence[Series]
    x_label: str
    y_label: str
    levels: Sequence[Level] = ()
    log: bool = False

    def figure(self) -> Element:
        """The drawing with caption and legend, for a page."""
        legend = element("ul", *(_entry(s) for s in self.series if s.points), class_="legend")
        return element("figure", element("figcaption", self.title), legend, self.drawing())

    def drawing(self, **attributes: object) -> Element:
        """The drawing without caption and legend, as an SVG element.

        Args:
            attributes: further attributes of the element.
        """
        drawn = [s for s in self.series if s.points]
        x, y = _axes(drawn, self.levels, self.log)
        return element(
            "svg",
            element("title", self.title),
            element("desc", self.summary),
            *_grid(x, y, self.x_label, self.y_label),
            *(_level(level, y) for level in self.levels),
            *(_curve(s, x, y) for s in drawn),
            viewBox=f"0 0 {WIDTH:g} {HEIGHT:g}",
            role="img",
            **attributes,
        )

    def picture(self, style: str) -> Element:
        """A complete SVG file: the drawing below its legend, on a background.

        Args:
            style: the style sheet.
        """
        entries, left = [], LEFT
        for series in self.series:
            name = element("text", series.name, x=34, y=9, class_="name")
            entries.append(element("g", _sample(series), name, transform=f"translate({left:g} 14)"))
            left += 60 + 7 * len(series.name)
        height = HEIGHT + 30
        return element(
            "svg",
            element("style", style),
            element("rect", width=WIDTH, height=height, class_="paper"),
            *entries,
            self.drawing(y=30, width=WIDTH, height=HEIGHT),
            xmlns="http://www.w3.org/2000/svg",
            viewBox=f"0 0 {WIDTH:g} {height:g}",
        )


def _axes(series: Sequence[Series], levels: Sequence[Level], log: bool) -> tuple[Axis, Axis]:
    xs = [x for s in series for x, _ in s.points] or [0.0]
    ys = [y for s in series for _, y in s.points] + [level.value for level in levels] or [0.0]
    if log:
        powers = [math.log10(y) for y in ys if y > 0] or [math.log10(NOTHING)]
        low, high = 10.0 ** math.floor(min(powers)), 10.0 ** math.ceil(max(powers))
        low, high = (low, high) if high > low else (low / 10, high * 10)
    else:
        low, high = _widened(min(ys), max(ys), 0.05)
    left, right = _widened(min(xs), max(xs), 0.0)
    return (
        Axis(left, right, LEFT, WIDTH - RIGHT),
        Axis(low, high, HEIGHT - BOTTOM, TOP, log),
    )


def _widened(low: float, high: float, share: float) -> tuple[float, float]:
    """The interval with a margin of ``share`` of its length; an empty interval is widened."""
    if high <= low:
        return low - max(abs(low) * 0.05, 0.5), high + max(abs(high) * 0.05, 0.5)
    return low - share * (high - low), high + share * (high - low)


def _grid(x: Axis, y: Axis, x_label: str, y_label: str) -> list[Element]:
    left, right, top, bottom = x.start, x.end, y.end, y.start
    parts = [element("path", d=f"M{left:g} {top:g}V{bottom:g}H{right:g}", class_="axis")]
    for value in y.ticks():
        at = f"{y.at(value):.1f}"
        parts.append(element("path", d=f"M{left:g} {at}H{right:g}", class_="grid"))
        parts.append(element("text", f"{value:.6g}", x=left - 8, y=at, class_="y"))
    for value in x.ticks():
        parts.append(element("text", f"{value:.6g}", x=f"{x.at(value):.1f}", y=bottom + 18))
    parts.append(element("text", x_label, x=(left + right) / 2, y=HEIGHT - 6))
    middle = (top + bottom) / 2
    turn = f"rotate(-90 12 {middle:g})"
    parts.append(element("text", y_label, x=12, y=middle, transform=turn))
    return parts


def _level(level: Level, y: Axis) -> Element:
    at = f"{y.at(level.value):.1f}"
    return element(
        "g",
        element("path", d=f"M{LEFT:g} {at}H{WIDTH - RIGHT:g}", class_="level"),
        element("text", level.name, x=WIDTH - RIGHT, y=float(at) - 5, class_="level"),
    )


def _curve(series: Series, x: Axis, y: Axis) -> Element:
    pixels = [(x.at(a), y.at(b)) for a, b in thinned(series.points)]
    line = element("polyline", points=" ".join(f"{a:.1f},{b:.1f}" for a, b in pixels))
    parts = [element("title", series.name), line]
    if series.marked or len(pixels) == 1:
        parts += [element("circle", cx=f"{a:.1f}", cy=f"{b:.1f}", r=3) for a, b in pixels]
    return element("g", *parts, class_=series.style)


def _entry(series: Series) -> Element:
    sample = element("svg", _sample(series), viewBox="0 0 28 10", aria_hidden="true")
    return element("li", sample, series.name)


def _sample(series: Series) -> Element:
    return element("g", element("path", d="M1 5H27", class_="stroke"), class_=series.style)
