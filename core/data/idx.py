"""Reads the IDX files of MNIST, Fashion-MNIST and KMNIST, gzip or unpacked.

An IDX file begins with two zero bytes, one byte for the type (8: unsigned byte) and one for the
number of dimensions, then each size as a 32-bit big-endian number, then the values row by row.
"""

import gzip
import math
import os
import struct
import zlib
from io import BufferedIOBase

import numpy as np
from numpy.typing import NDArray

from triptych.core.data.decode import Decoding
from triptych.core.data.source import Arrays, native_path
from triptych.core.errors import UserError, printable
from triptych.core.files.arrays import MAX_RATIO

TRAIN, TEST = "train", "t10k"
"""How the names of the two splits' files begin."""

UNSIGNED_BYTE = 8
GZIP = b"\x1f\x8b"
"""The first bytes of every gzip file."""


def idx(root: str, how: Decoding, *, train: bool) -> Arrays:
    """The training or the held-out images, grey, and their labels.

    The classes are the numbers from 0 to the largest label of the split.

    Args:
        root: the folder of the files, or the parent of a folder ``raw`` that holds them.

    Raises:
        UserError: files are missing, damaged, or no IDX files of images and labels.
    """
    folder, split = native_path(root), TRAIN if train else TEST
    where, pixels = _read(folder, split, "images", 3)
    beside, labels = _read(folder, split, "labels", 1)
    if len(labels) != len(pixels):
        raise UserError(
            f"data.root: {printable(beside)}: {len(labels)} labels, but {len(pixels)} images in "
            f"{printable(os.path.basename(where))}; take both from one download"
        )
    classes = tuple(map(str, range(int(labels.max()) + 1)))
    return Arrays(f"idx/{split}", pixels, labels.astype(np.int64), classes, how)


def held_out(root: str, how: Decoding, bank: Arrays) -> Arrays:
    """The held-out images with the classes of the training split ``bank``.

    Raises:
        UserError: as in ``idx``, or a label is beyond the classes.
    """
    queries = idx(root, how, train=False)
    if len(queries.classes) > len(bank.classes):
        raise UserError(
            f"data.root: {printable(root)}: the held-out labels reach {len(queries.classes) - 1}, "
            f"those of the training images only {len(bank.classes) - 1}; take all four files from "
            "one download"
        )
    queries.classes = bank.classes
    return queries


def _read(folder: str, split: str, kind: str, dimensions: int) -> tuple[str, NDArray[np.uint8]]:
    """The path and the values of one file."""
    path = _locate(folder, split, kind, dimensions)
    try:
        with open(path, "rb") as file:
            packed = file.read(2) == GZIP
            file.seek(0)
            size = os.fstat(file.fileno()).st_size
            if packed:
                with gzip.open(file) as unpacked:
                    return path, _values(unpacked, dimensions, MAX_RATIO * size)
            return path, _values(file, dimensions, size)
    except (EOFError, ValueError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(
            f"data.root: {printable(path)}: not a whole IDX file of {kind} ({error}); download it "
            "again"
        ) from error
    except OSError as error:
        raise UserError(f"data.root: {printable(path)}: {error.strerror}") from error


def _locate(folder: str, split: str, kind: str, dimensions: int) -> str:
    """The path of a file: its published name, or the one that some programs unpack it to."""
    names = [f"{split}-{kind}{dot}idx{dimensions}-ubyte" for dot in ("-", ".")]
    for place in (folder, os.path.join(folder, "raw")):
        for name in names:
            for candidate in (name, f"{name}.gz"):
                if os.path.isfile(os.path.join(place, candidate)):
                    return os.path.join(place, candidate)
    raise UserError(
        f"data.root: {printable(folder)}: no {names[0]} here, nor {names[0]}.gz; put the four "
        "files of MNIST, Fashion-MNIST or KMNIST into this folder"
    )


def _values(file: BufferedIOBase, dimensions: int, limit: int) -> NDArray[np.uint8]:
    """The array of an open file.

    Args:
        limit: most bytes that the content can have.

    Raises:
        ValueError: the header is wrong, or the content is shorter or longer than it states.
    """
    head = file.read(4 + 4 * dimensions)
    if head[:4] != bytes((0, 0, UNSIGNED_BYTE, dimensions)) or len(head) < 4 + 4 * dimensions:
        raise ValueError(f"it begins with {head[:4].hex(' ') or 'nothing'}")
    shape = struct.unpack(f">{dimensions}I", head[4:])
    size = math.prod(shape)
    if not size:
        raise ValueError(f"it holds no values: {_by(shape)}")
    if size > limit:  # before any memory is taken for a size that cannot be true
        raise ValueError(f"its header states {_by(shape)} values, more than the file can hold")
    content = file.read(size)
    if len(content) < size or file.read(1):
        more = "more" if len(content) == size else f"{len(content)}"
        raise ValueError(f"its header states {size} values, {_by(shape)}, and it holds {more}")
    return np.frombuffer(content, np.uint8).reshape(shape)


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
