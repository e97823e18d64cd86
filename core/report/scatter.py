"""Points in the plane as inline SVG: one colour for each class."""

from collections.abc import Sequence
from xml.etree.ElementTree import Element

import numpy as np

from triptych.core.contracts import Array
from triptych.core.report.images import GOLDEN_ANGLE
from triptych.core.report.markup import element

SIDE, MARGIN = 400.0, 16.0
NAMED = 40
"""Most classes whose names stand in the drawing."""


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
    places = _placed(points)
    groups = [(name, places[labels == i]) for i, name in enumerate(classes)] or [("", places)]
    drawn = [(i, name, group) for i, (name, group) in enumerate(groups) if len(group)]
    named = drawn if classes and len(drawn) <= NAMED else []
    drawing = element(
        "svg",
        element("title", title),
        element("desc", summary),
        element("rect", x=1, y=1, width=SIDE - 2, height=SIDE - 2, rx=4, class_="frame"),
        *(_points(i, name, group, len(groups)) for i, name, group in drawn),
        *(_name(name, group) for _, name, group in named),
        viewBox=f"0 0 {SIDE:g} {SIDE:g}",
        role="img",
        class_="map",
    )
    return element("figure", element("figcaption", title), drawing)


def _placed(points: Array) -> Array:
    """The points inside the frame. Both directions have the same scale."""
    low, high = points.min(axis=0), points.max(axis=0)
    scale = (SIDE - 2 * MARGIN) / max(float((high - low).max()), 1e-12)
    placed: Array = (points - (low + high) / 2) * (scale, -scale) + SIDE / 2
    return placed


def _points(number: int, name: str, group: Array, groups: int) -> Element:
    """Round dots as one path of lines without length: ten bytes for each point."""
    dots = "".join(f"M{x:.0f} {y:.0f}h0" for x, y in group)
    hue = 360 * (number / groups if groups <= NAMED else number * GOLDEN_ANGLE % 1.0)
    colour = f"hsl({hue:.0f} 70% {45 + 15 * (number % 2)}%)"
    return element("g", element("title", name), element("path", d=dots, stroke=colour))


def _name(name: str, group: Array) -> Element:
    """The name of a class at the middle of its points."""
    x, y = np.median(group, axis=0)
    return element("text", name, x=f"{x:.0f}", y=f"{y + 4:.0f}")
