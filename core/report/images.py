"""Images of a data set, and maps of numbers, as small PNG pictures inside a page."""

import base64
import colorsys
import io
from xml.etree.ElementTree import Element

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from triptych.core.config.spec import RunSpec
from triptych.core.contracts import Array
from triptych.core.report.markup import element

Pixels = NDArray[np.uint8]

GOLDEN_ANGLE = 0.381966
"""Step between the hues of neighbouring numbers, as a share of the colour circle.

The golden angle keeps these hues far apart.
"""
HEAT = ((0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164))
"""Colours of 0, 1/4, 1/2, 3/4 and 1: from dark to light, so they are ordered in grey as well."""


def unnormalized(image: Array, spec: RunSpec) -> Pixels:
    """Undoes the normalisation: (C, H, W) -> (H, W, 3) uint8."""
    mean, std = (np.array(v)[:, None, None] for v in (spec.augment.mean, spec.augment.std))
    planes = np.clip(np.rint((image * std + mean) * 255), 0, 255).astype(np.uint8)
    # Four channels: the first three are shown. One or two channels: the first is shown as grey.
    planes = planes[:3] if len(planes) >= 3 else np.repeat(planes[:1], 3, axis=0)
    return planes.transpose(1, 2, 0)


def heat(values: Array) -> Pixels:
    """Numbers from 0 to 1 as colours. (rows, columns) -> (rows, columns, 3) uint8."""
    places = np.linspace(0, 1, len(HEAT))
    channels = [np.interp(values, places, levels) for levels in zip(*HEAT, strict=True)]
    return np.rint(np.stack(channels, axis=-1)).astype(np.uint8)


def fitted(size: tuple[int, int], side: int) -> tuple[int, int]:
    """Width and height with the same proportions whose longer one is ``side``."""
    longest = max(size)
    width, height = (max(1, round(length * side / longest)) for length in size)
    return width, height


def picture(pixels: Pixels, size: tuple[int, int], alt: str) -> Element:
    """An image embedded in the page.

    Args:
        pixels: (H, W, 3). A smaller image is enlarged by the page, pixel by pixel.
        size: width and height on the page, CSS pixels.
        alt: description for readers who cannot see the image.
    """
    image = Image.fromarray(pixels)
    # Screens have up to about two pixels for one of CSS.
    finest = (2 * size[0], 2 * size[1])
    enlarged = image.width < size[0]
    if image.width > finest[0]:
        image = image.resize(finest, Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "png")
    data = base64.b64encode(file.getvalue()).decode()
    return element(
        "img",
        src=f"data:image/png;base64,{data}",
        width=size[0],
        height=size[1],
        alt=alt,
        class_="pixels" if enlarged else None,
    )


def colour(number: int) -> tuple[int, int, int]:
    """The colour that stands for a number: red, green and blue, 0 to 255."""
    hue, light = number * GOLDEN_ANGLE % 1.0, 0.35 + 0.3 * (number % 2)
    red, green, blue = colorsys.hls_to_rgb(hue, light, 0.7)
    return round(255 * red), round(255 * green), round(255 * blue)
