"""Views by OpenCV: the operations of ``pixels`` in less time, with other pixels.

A resize does not smooth an image that gets smaller, a blur is a Gaussian filter instead of three
boxes, and colours are rounded elsewhere. ``tools/bench.py pixels`` prints how far each operation is
from Pillow's. RandAugment is left to Pillow.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from triptych.core.data import pixels
from triptych.core.data.augment import Change, arguments, operation
from triptych.core.data.pixels import Interpolation, Size
from triptych.core.data.stored import stored

Pixels = NDArray[np.uint8]

cv2.setNumThreads(1)  # workers share the cores already
_FILTERS = {"bilinear": cv2.INTER_LINEAR, "bicubic": cv2.INTER_CUBIC}
_LEVELS = np.arange(256, dtype=np.uint8)
_CIRCLE = 180
"""Number of hues of OpenCV."""


def write(image: Image.Image, changes: Sequence[Change], out: Pixels) -> None:
    """See ``views.write``."""
    first, *further = changes
    whole = _array(image)
    if operation(first) in _RESIZES:  # before the bands are taken apart, which reads every pixel
        whole = _RESIZES[operation(first)](whole, **arguments(first))
    else:
        further = [first, *further]
    view = _View(whole, image.mode)
    for change in further:
        if operation(change) in _OPERATIONS:
            _OPERATIONS[operation(change)](view, **arguments(change))
        else:
            moved = change(view.image())
            view = _View(_array(moved), moved.mode)
    view.write(out)


def _array(image: Image.Image) -> Pixels:
    """The pixels of an image, (H, W) or (H, W, bands); RGB and LA may have four bytes."""
    found, size = stored(image)
    return found.reshape((image.height, image.width, size)[: 2 if size == 1 else 3])


def _resize(image: Pixels, size: Size, interpolation: Interpolation) -> Pixels:
    resized: Pixels = cv2.resize(image, size[::-1], interpolation=_FILTERS[interpolation])
    return resized


def _crop_resize(
    image: Pixels, box: tuple[int, int, int, int], size: Size, interpolation: Interpolation
) -> Pixels:
    top, left, height, width = box
    return _resize(image[top : top + height, left : left + width], size, interpolation)


_RESIZES: dict[Callable[..., Any], Callable[..., Pixels]] = {
    pixels.resize: _resize,
    pixels.crop_resize: _crop_resize,
}


class _View:
    """An image, changed by the operations of ``pixels`` of the same names.

    Args:
        whole: as ``_array`` gives it.
        mode: of the image.
    """

    def __init__(self, whole: Pixels, mode: str) -> None:
        last = whole.shape[-1] - 1 if whole.ndim == 3 else 0
        self._alpha = cv2.extractChannel(whole, last) if mode.endswith("A") else None
        if mode == "LA":
            whole = cv2.extractChannel(whole, 0)
        self._colours: Pixels = whole
        if mode.startswith("RGB") and last == 3:
            self._colours = cv2.cvtColor(whole, cv2.COLOR_RGBA2RGB)

    @property
    def _grey(self) -> Pixels:
        colours = self._colours
        grey: Pixels = colours if colours.ndim == 2 else cv2.cvtColor(colours, cv2.COLOR_RGB2GRAY)
        return grey

    def _move(self, operation: Callable[..., Pixels], **arguments: Any) -> None:
        """Applies an operation to all bands."""
        self._colours = operation(self._colours, **arguments)
        if self._alpha is not None:
            self._alpha = operation(self._alpha, **arguments)

    def resize(self, **arguments: Any) -> None:
        self._move(_resize, **arguments)

    def crop_resize(self, **arguments: Any) -> None:
        self._move(_crop_resize, **arguments)

    def affine(self, angle: float, shift: tuple[float, float], scale: float, shear: float) -> None:
        height, width = self._colours.shape[:2]
        a, b, c, d, e, f = pixels.inverse((height, width), angle, shift, scale, shear)
        # OpenCV counts from the middle of the first pixel, Pillow from its corner.
        c, f = c + (a + b - 1) / 2, f + (d + e - 1) / 2
        matrix = np.array(((a, b, c), (d, e, f)))
        flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        self._move(partial(cv2.warpAffine, M=matrix, dsize=(width, height), flags=flags))

    def horizontal_flip(self) -> None:
        self._move(cv2.flip, flipCode=1)

    def _scale(self, factor: float, offset: float) -> None:
        """Multiplies and adds. OpenCV takes five times as long to look up a table."""
        self._colours = cv2.addWeighted(self._colours, factor, self._colours, 0, offset)

    def brightness(self, factor: float) -> None:
        self._scale(factor, 0)

    def contrast(self, factor: float) -> None:
        self._scale(factor, int(cv2.mean(self._grey)[0] + 0.5) * (1 - factor))

    def saturation(self, factor: float) -> None:
        if self._colours.ndim == 3:
            grey = cv2.cvtColor(self._grey, cv2.COLOR_GRAY2RGB)
            self._colours = cv2.addWeighted(self._colours, factor, grey, 1 - factor, 0)

    def hue(self, shift: float) -> None:
        if self._colours.ndim == 3:
            planes = cv2.split(cv2.cvtColor(self._colours, cv2.COLOR_RGB2HSV))
            turn, hue = round(shift * _CIRCLE) % _CIRCLE, planes[0]
            # The sum may be more than 255.
            rest = np.uint8(_CIRCLE - turn)
            hue[...] = np.where(hue >= rest, hue - rest, hue + np.uint8(turn))
            self._colours = cv2.cvtColor(cv2.merge(planes), cv2.COLOR_HSV2RGB)

    def grayscale(self) -> None:
        self._colours = self._grey

    def gaussian_blur(self, radius: float) -> None:
        if radius:
            self._colours = cv2.GaussianBlur(
                self._colours, (0, 0), radius, borderType=cv2.BORDER_REPLICATE
            )

    def solarize(self, threshold: int) -> None:
        table = np.where(_LEVELS < threshold, _LEVELS, 255 - _LEVELS)
        self._colours = cv2.LUT(self._colours, table)

    def image(self) -> Image.Image:
        """As an image of Pillow."""
        bands = [Image.fromarray(np.ascontiguousarray(self._colours))]
        if self._alpha is not None:
            bands = [*bands[0].split(), Image.fromarray(np.ascontiguousarray(self._alpha))]
        mode = ("L", "LA", "RGB", "RGBA")[sum(len(band.getbands()) for band in bands) - 1]
        return bands[0] if len(bands) == 1 else Image.merge(mode, bands)

    def write(self, out: Pixels) -> None:
        """Writes the bands to planes (C, H, W); grey fills all colours."""
        colours = self._colours
        count = len(out) - (self._alpha is not None)
        if colours.ndim == 2:
            out[:count] = colours
        else:
            for channel in range(count):
                cv2.extractChannel(colours, channel, out[channel])
        if self._alpha is not None:
            out[-1] = self._alpha


_OPERATIONS: dict[Callable[..., Any], Callable[..., None]] = {
    getattr(pixels, name): getattr(_View, name)
    for name in (
        *("resize", "crop_resize", "affine", "horizontal_flip", "brightness", "contrast"),
        *("saturation", "hue", "grayscale", "gaussian_blur", "solarize"),
    )
}
