"""Makes views of images: with Pillow, or with compiled loops that give the same bytes."""

import importlib
import importlib.util
import math
from collections.abc import Callable, Sequence
from functools import reduce
from itertools import takewhile
from typing import cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from triptych.core.data import compiled, pixels
from triptych.core.data.augment import Change, arguments, operation
from triptych.core.data.compiled import Kernels, address
from triptych.core.data.stored import Part, resize
from triptych.core.errors import UserError

Planes = NDArray[np.uint8]


def check_engine(engine: str) -> None:
    """Raises UserError if the package of an engine is missing."""
    if engine == "opencv" and importlib.util.find_spec("cv2") is None:
        raise UserError(
            "augment.engine: opencv: OpenCV is not installed; run: pip install 'triptych[opencv]', "
            "or set it to pillow"
        )


def engine_versions(engine: str) -> dict[str, str]:
    """The version of the package that decides the pixels of an engine, beside Pillow.

    Raises:
        UserError: the package is missing.
    """
    check_engine(engine)
    return {} if engine == "pillow" else {"opencv": importlib.import_module("cv2").__version__}


def write(
    image: Image.Image, changes: Sequence[Change], out: Planes, engine: str = "pillow"
) -> None:
    """Makes a view.

    Args:
        engine: see ``augment.engine``.
        changes: of the image, as ``augment.draw`` gives them.
        out: (C, H, W) of the view's size, gets the bands of the result. Grey fills all colours.
    """
    if engine == "opencv":
        from triptych.core.data import opencv

        opencv.write(image, changes, out)
        return
    kernels = compiled.kernels(out.size)
    if kernels is None:
        write_by_pillow(image, changes, out)
    else:
        write_compiled(kernels, image, changes, out)


def write_by_pillow(image: Image.Image, changes: Sequence[Change], out: Planes) -> None:
    """``write``, always with Pillow."""
    pixels.write_planes(reduce(lambda result, change: change(result), changes, image), out)


def write_compiled(
    kernels: Kernels, image: Image.Image, changes: Sequence[Change], out: Planes
) -> None:
    """``write`` with compiled loops, up to the first change that has none; the rest with Pillow."""
    first, *further = changes
    # The loops trust the number of planes. Pillow fills further planes with grey, or refuses.
    fits = len(image.getbands()) == len(out)
    part = _part(first, image, (out.shape[1], out.shape[2])) if fits else None
    served = list(takewhile(is_compiled, further))
    # A mirror commutes with the operations of a view, and a resize makes it for nothing.
    mirrored = served.count(pixels.horizontal_flip) % 2 == 1
    if part is None or not resize(kernels, image, part, mirrored, out):
        write_by_pillow(image, changes, out)
        return
    view = _View(kernels, image.mode, out)
    for change in served:
        if change is not pixels.horizontal_flip:
            _OPERATIONS[operation(change)](view, **arguments(change))
    if len(served) < len(further):
        write_by_pillow(view.image(), further[len(served) :], out)
    else:
        view.finish()


# ------------------------------------------------------------------------------------------ changes


def _part(change: Change, image: Image.Image, size: pixels.Size) -> Part | None:
    """What a change resizes for a view of this size; None for other changes."""
    given, function = arguments(change), operation(change)
    cubic = given.get("interpolation") == "bicubic"
    everything = (0, 0, image.height, image.width)
    if function is pixels.crop_resize:
        return Part(given["box"], size, (0, 0), cubic)
    if function is pixels.resize:
        return Part(everything, size, (0, 0), cubic)
    if function is pixels.center_cover:
        rounding = given["rounding"]
        whole = pixels.cover_size(image, size, given["factor"], rounding)
        left, top, *_ = pixels.middle(whole, size, rounding)
        return None if pixels.is_long(whole, size) else Part(everything, whole, (top, left), cubic)
    return None


def is_compiled(change: Change) -> bool:
    """Whether there is a compiled loop for a change that follows the resize of a view."""
    function = operation(change)
    if function is pixels.gaussian_blur:
        return box_weights(arguments(change)["radius"]) is not None
    return function is pixels.horizontal_flip or function in _OPERATIONS


def box_weights(radius: float) -> tuple[int, int, int] | None:
    """Weights of the box blur that Pillow makes three times for a Gaussian blur.

    The length of the box is that of Gwosdek et al. (SSVM 2011); Pillow computes in single
    precision.

    Returns:
        The weights of the middle pixel, of each neighbour and of each one beyond, with 24 binary
        places. None for boxes that are longer.
    """
    one, three, six = (np.float32(value) for value in (1, 3, 6))
    variance = np.float32(radius) * np.float32(radius) / three
    length = np.float32(math.sqrt(12.0 * float(variance) + 1.0))
    whole = np.float32(math.floor((float(length) - 1.0) / 2.0))
    if whole > 1:
        return None
    part = (whole + whole + one) * (whole * (whole + one) - three * variance)
    size = whole + part / (six * (variance - (whole + one) * (whole + one)))
    inner = int(np.float32(1 << 24) / (size + size + one))
    outer = ((1 << 24) - (2 * int(size) + 1) * inner) // 2
    return (inner, inner, outer) if int(size) else (inner, outer, 0)


class _View:
    """A view in planes, changed in place by the operations of ``pixels`` of the same names.

    Attributes:
        planes: (C, H, W).
    """

    def __init__(self, kernels: Kernels, mode: str, planes: Planes) -> None:
        self.planes = planes
        self._kernels, self._mode = kernels, mode
        self._count = planes[0].size
        self._start = address(planes)

    @property
    def _colours(self) -> int:
        """Number of the first planes that hold colours now."""
        return 3 if self._mode.startswith("RGB") else 1

    @property
    def _alpha(self) -> bool:
        """Whether the last plane holds alpha."""
        return self._mode.endswith("A")

    def brightness(self, factor: float) -> None:
        self._kernels.blend(self._start, self._colours * self._count, 0.0, factor)

    def contrast(self, factor: float) -> None:
        total = np.empty(1, np.int64)
        self._kernels.luma_sum(self._start, self._count, self._colours, address(total))
        mean = float(int(int(total[0]) / self._count + 0.5))
        self._kernels.blend(self._start, self._colours * self._count, mean, factor)

    def saturation(self, factor: float) -> None:
        if self._colours == 3:
            self._kernels.saturate(self._start, self._count, factor)

    def hue(self, shift: float) -> None:
        if self._colours == 3:
            self._kernels.turn_hue(self._start, self._count, int(shift * 255) % 256)

    def grayscale(self) -> None:
        if self._colours == 3:
            self._kernels.grey(self._start, self._count)
            self._mode = "LA" if self._alpha else "L"

    def gaussian_blur(self, radius: float) -> None:
        weights = cast(tuple[int, int, int], box_weights(radius))  # ``is_compiled`` has asked
        _, height, width = self.planes.shape
        padded, spare = np.empty(width + 4, np.uint8), np.empty((2, height, width), np.uint8)
        first, second = address(spare[0]), address(spare[1])
        for number in range(self._colours):
            plane = self._start + number * self._count
            self._kernels.box_across(plane, height, width, *weights, address(padded))
            for source, target in ((plane, first), (first, second), (second, plane)):
                self._kernels.box_down(source, height, width, *weights, target)

    def solarize(self, threshold: int) -> None:
        self._kernels.solarize(self._start, self._colours * self._count, threshold)

    def finish(self) -> None:
        """Copies grey to all planes of colours."""
        self.planes[self._colours : len(self.planes) - self._alpha] = self.planes[0]

    def image(self) -> Image.Image:
        """The view as an image."""
        kept = [*range(self._colours), *([len(self.planes) - 1] if self._alpha else [])]
        bands = [Image.fromarray(self.planes[number]) for number in kept]
        return Image.merge(self._mode, bands) if len(bands) > 1 else bands[0]


_OPERATIONS: dict[Callable[..., Image.Image], Callable[..., None]] = {
    pixels.brightness: _View.brightness,
    pixels.contrast: _View.contrast,
    pixels.saturation: _View.saturation,
    pixels.hue: _View.hue,
    pixels.grayscale: _View.grayscale,
    pixels.gaussian_blur: _View.gaussian_blur,
    pixels.solarize: _View.solarize,
}
