"""Reads STL-10 from its binary files, one image at a time.

An image is 96 by 96 pixels: the red plane, then green, then blue, each column by column. A label is
one byte, from 1 to 10.
"""

import os
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from triptych.core.data.decode import DamagedImage, Decoding, to_mode
from triptych.core.data.source import UNLABELLED, native_path
from triptych.core.errors import UserError, printable

CLASSES = (
    *("airplane", "bird", "car", "cat", "deer"),
    *("dog", "horse", "monkey", "ship", "truck"),
)
SIDE = 96
BYTES = 3 * SIDE * SIDE
"""Bytes of one image."""

UNLABELED = "unlabeled"
"""The published name of the part without labels."""


class Stl:
    """Images of one or more parts of STL-10, read when they are needed; see ``Source``."""

    classes = CLASSES

    def __init__(self, root: str, parts: Sequence[str], how: Decoding) -> None:
        """Opens parts: "train", "test" or "unlabeled".

        Args:
            root: the folder of the files, or its parent folder.

        Raises:
            UserError: files are missing, or do not have the size of whole images.
        """
        folder = _locate(native_path(root), parts[0])
        self._how, self._parts = how, tuple(parts)
        self._paths = [os.path.join(folder, f"{part}_X.bin") for part in parts]
        counts = [_count(path) for path in self._paths]
        self._ends = np.cumsum(counts)
        self._labels = np.concatenate(
            [_labels(folder, part, count) for part, count in zip(parts, counts, strict=True)]
        )

    def __len__(self) -> int:
        """How many images."""
        return len(self._labels)

    def image(self, index: int) -> Image.Image:
        """See ``Source``."""
        part, place = self._place(index)
        try:
            with open(self._paths[part], "rb") as file:
                file.seek(place * BYTES)
                content = file.read(BYTES)
        except OSError as error:
            raise DamagedImage(f"{printable(self._paths[part])}: {error.strerror}") from error
        if len(content) < BYTES:
            raise DamagedImage(f"{printable(self._paths[part])}: shorter than at the start")
        planes = np.frombuffer(content, np.uint8).reshape(3, SIDE, SIDE)
        pixels = np.ascontiguousarray(planes.transpose(2, 1, 0))
        return to_mode(Image.fromarray(pixels), self._how)

    def label(self, index: int) -> int:
        """See ``Source``; -1 in the part without labels."""
        return int(self._labels[index])

    def name(self, index: int) -> str:
        """``stl10/part[number]``."""
        part, place = self._place(index)
        return f"stl10/{self._parts[part]}[{place}]"

    key = name

    def _place(self, index: int) -> tuple[int, int]:
        """The part that holds an image, and its number in the part."""
        part = int(np.searchsorted(self._ends, index, side="right"))
        return part, index - (int(self._ends[part - 1]) if part else 0)


def _locate(root: str, part: str) -> str:
    for folder in (root, os.path.join(root, "stl10_binary")):
        if os.path.isfile(os.path.join(folder, f"{part}_X.bin")):
            return folder
    raise UserError(
        f"data.root: {printable(root)}: no {part}_X.bin here; unpack stl10_binary.tar.gz into this "
        "folder"
    )


def _count(path: str) -> int:
    """Number of images in a file."""
    try:
        size = os.path.getsize(path)
    except OSError as error:
        raise UserError(f"data.root: {printable(path)}: {error.strerror}") from error
    if not size or size % BYTES:
        raise UserError(
            f"data.root: {printable(path)}: {size} bytes are not whole images of {BYTES}; unpack "
            "stl10_binary.tar.gz again"
        )
    return size // BYTES


def _labels(folder: str, part: str, count: int) -> NDArray[np.int64]:
    """The labels of one part, (count,), from 0."""
    if part == UNLABELED:
        return np.full(count, UNLABELLED, np.int64)
    path = os.path.join(folder, f"{part}_y.bin")
    try:
        with open(path, "rb") as file:
            content = file.read(count + 1)
    except OSError as error:
        raise UserError(f"data.root: {printable(path)}: {error.strerror}") from error
    labels = np.frombuffer(content, np.uint8)
    if len(labels) != count or not 1 <= labels.min() <= labels.max() <= len(CLASSES):
        raise UserError(
            f"data.root: {printable(path)}: expected {count} labels from 1 to {len(CLASSES)}, one "
            f"byte for each image in {part}_X.bin; unpack stl10_binary.tar.gz again"
        )
    return labels.astype(np.int64) - 1
