"""Points in the plane as inline SVG: one colour for each class."""

from collections.abc import Iterator, Sequence
from xml.etree.ElementTree import Element

import numpy as np

from triptych.core.contracts import Array
from triptych.core.report.images import GOLDEN_ANGLE
from triptych.core.report.markup import element

SIDE, MARGIN = 400.0, 18.0
LOWEST = 160.0
"""Least height of a drawing."""
LINE, LETTER = 13.0, 7.0
"""Height of a name and width of its letters, about."""
NAMED = 40
"""Most classes whose names stand in the drawing and in the legend."""


def scatter(
    title: str, summary: str, points: Array, labels: Array, classes: Sequence[str]
) -> Element:
    """A figure. The axes have no meaning of their own, so it has none.

    Args:
        summary: description for readers who cannot see the drawing.
        points: (N, 2), with different values in each column.
        labels: (N,) int64, positions in ``classes``; unused if there are no classes.
        classes: names; empty: all points have one colour.
    """
    places, height = _placed(points)
    groups = [(name, places[labels == i]) for i, name in enumerate(classes)] or [("", places)]
    drawn = [(i, name, group) for i, (name, group) in enumerate(groups) if len(group)]
    named = drawn if classes and len(drawn) <= NAMED else []
    drawing = element(
        "svg",
        element("title", title),
        element("desc", summary),
        element("rect", x=1, y=1, width=SIDE - 2, height=height - 2, rx=4, class_="frame"),
        *(_points(name, group, _colour(i, len(groups))) for i, name, group in drawn),
        *_names([(name, *np.median(group, axis=0)) for _, name, group in named]),
        viewBox=f"0 0 {SIDE:g} {height:.0f}",
        role="img",
        class_="map",
    )
    legend = element("ul", *(_entry(n, _colour(i, len(groups))) for i, n, _ in named))
    legend.set("class", "legend")
    return element("figure", element("figcaption", title), drawing, legend)


def _placed(points: Array) -> tuple[Array, float]:
    """The points in the frame, with one scale for both directions, and the frame's height."""
    low, high = points.min(axis=0), points.max(axis=0)
    scale = (SIDE - 2 * MARGIN) / max(float((high - low).max()), 1e-12)
    height = max(LOWEST, float((high - low)[1]) * scale + 2 * MARGIN)
    placed: Array = (points - (low + high) / 2) * (scale, -scale) + (SIDE / 2, height / 2)
    return placed, height


def _colour(number: int, groups: int) -> str:
    hue = 360 * (number / groups if groups <= NAMED else number * GOLDEN_ANGLE % 1.0)
    return f"hsl({hue:.0f} 70% {45 + 15 * (number % 2)}%)"


def _points(name: str, group: Array, colour: str) -> Element:
    """Round dots as one path of lines without length: ten bytes for each point."""
    dots = "".join(f"M{x:.0f} {y:.0f}h0" for x, y in group)
    return element("g", element("title", name), element("path", d=dots, stroke=colour))


def _names(wanted: list[tuple[str, float, float]]) -> Iterator[Element]:
    """The name of each class at the middle of its points, or below a name that is there."""
    taken: list[tuple[float, float, float]] = []
    for name, x, y in sorted(wanted, key=lambda each: each[2]):
        half = LETTER * len(name) / 2
        x = min(max(x, half + 2), max(SIDE - half - 2, SIDE / 2))
        for left, other, right in taken:
            if left < x + half and x - half < right and abs(y - other) < LINE:
                y = other + LINE
        taken.append((x - half, y, x + half))
        taken.sort(key=lambda box: box[1])
        yield element("text", name, x=f"{x:.0f}", y=f"{y + 4:.0f}")


def _entry(name: str, colour: str) -> Element:
    dot = element("svg", element("circle", cx=5, cy=5, r=4, color=colour), viewBox="0 0 10 10")
    dot.set("aria-hidden", "true")
    return element("li", dot, name)
