"""How far the operations of ``augment.engine: opencv`` are from Pillow's, as a table."""

import argparse
from collections.abc import Iterator
from functools import partial

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from triptych.core.data import pixels, views
from triptych.core.data.augment import Change
from triptych.core.data.pixels import Interpolation
from triptych.core.data.views import check_engine

SIZE = (224, 224)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """``bench pixels`` has none."""


def run(arguments: argparse.Namespace) -> int:
    """Prints the table in Markdown."""
    check_engine("opencv")
    print("| operation | mean difference | 99 % within | largest |\n|---|---|---|---|")
    for name, gaps in differences():
        share = int(np.percentile(gaps, 99))
        print(f"| {name} | {gaps.mean():.2f} | {share} | {gaps.max()} |")
    return 0


def differences() -> Iterator[tuple[str, NDArray[np.int64]]]:
    """(operation, absolute differences of the values 0 ... 255 of both engines)."""
    from sklearn.datasets import load_sample_images

    photographs = [Image.fromarray(array) for array in load_sample_images().images]
    for name, changes in CASES.items():
        gaps = [_gaps(photograph, changes) for photograph in photographs]
        yield name, np.concatenate(gaps)


def _gaps(image: Image.Image, changes: list[Change]) -> NDArray[np.int64]:
    made = np.empty((2, 3, *SIZE), np.uint8)
    for engine, out in zip(("pillow", "opencv"), made, strict=True):
        views.write(image, changes, out, engine)
    first, second = made.astype(np.int64)
    gaps: NDArray[np.int64] = np.abs(first - second).ravel()
    return gaps


def _crop(box: tuple[int, int, int, int], interpolation: Interpolation) -> Change:
    return partial(pixels.crop_resize, box=box, size=SIZE, interpolation=interpolation)


_PLAIN = _crop((40, 60, *SIZE), "bilinear")
"""A crop of the view's size, whose resize changes nothing."""
_SMALLER, _LARGER = (10, 20, 400, 560), (40, 60, 100, 120)
CASES: dict[str, list[Change]] = {
    "resize to smaller, bilinear": [_crop(_SMALLER, "bilinear")],
    "resize to smaller, bicubic": [_crop(_SMALLER, "bicubic")],
    "resize to larger, bilinear": [_crop(_LARGER, "bilinear")],
    "resize to larger, bicubic": [_crop(_LARGER, "bicubic")],
    "brightness 1.3": [_PLAIN, partial(pixels.brightness, factor=1.3)],
    "contrast 0.7": [_PLAIN, partial(pixels.contrast, factor=0.7)],
    "saturation 1.4": [_PLAIN, partial(pixels.saturation, factor=1.4)],
    "hue 0.08": [_PLAIN, partial(pixels.hue, shift=0.08)],
    "grayscale": [_PLAIN, pixels.grayscale],
    "gaussian_blur 0.5": [_PLAIN, partial(pixels.gaussian_blur, radius=0.5)],
    "gaussian_blur 1.5": [_PLAIN, partial(pixels.gaussian_blur, radius=1.5)],
    "solarize 128": [_PLAIN, partial(pixels.solarize, threshold=128)],
    "horizontal_flip": [_PLAIN, pixels.horizontal_flip],
    "random_affine": [
        _PLAIN,
        partial(pixels.affine, angle=10.0, shift=(5.0, -3.0), scale=1.1, shear=5.0),
    ],
}
"""Each operation, on a crop of a photograph."""
