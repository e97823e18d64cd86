"""Builds HTML and SVG trees by nested calls; every string is escaped when a tree is written."""

import re
from xml.etree.ElementTree import Element, tostring

# HTML and XML documents may not hold these characters, but a hostile file name can.
FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def element(tag: str, *children: Element | str, **attributes: object) -> Element:
    """An element with its children in order.

    Args:
        attributes: ``class_="x"`` and ``stroke_width=2`` become ``class`` and ``stroke-width``;
            an attribute with the value None is left out.
    """
    made = Element(
        tag,
        {
            name.rstrip("_").replace("_", "-"): _clean(str(value))
            for name, value in attributes.items()
            if value is not None
        },
    )
    for child in children:
        if isinstance(child, Element):
            made.append(child)
        elif len(made):
            made[-1].tail = (made[-1].tail or "") + _clean(child)
        else:
            made.text = (made.text or "") + _clean(child)
    return made


def document(root: Element) -> str:
    """The page as text."""
    return "<!DOCTYPE html>\n" + tostring(root, encoding="unicode", method="html") + "\n"


def _clean(text: str) -> str:
    return FORBIDDEN.sub("\N{REPLACEMENT CHARACTER}", text)
