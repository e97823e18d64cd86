"""Reads Oxford Flowers-102 from its published files: a folder of images and two MATLAB files."""

import os
import struct
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from triptych.core.data.decode import Decoding
from triptych.core.data.source import Files, native_path
from triptych.core.errors import UserError, printable

CLASSES = 102
LABELS, SPLITS = "imagelabels.mat", "setid.mat"
PARTS = {True: ("trnid", "valid"), False: ("tstid",)}
"""Whether to train -> lists of image numbers. Recipes train on training and validation images."""

MAX_BYTES = 2**20
"""Largest MATLAB file; the published ones have 502 and 14 989 bytes."""

_MALFORMED = (
    EOFError,
    KeyError,
    IndexError,
    MemoryError,
    NotImplementedError,
    OSError,
    OverflowError,
    TypeError,
    UnicodeDecodeError,
    ValueError,
    struct.error,
    zlib.error,
)
"""Exceptions of SciPy's reader on malformed bytes."""


def flowers102(root: str, how: Decoding, *, train: bool) -> Files:
    """2040 images for training (training and validation) or 6149 held-out ones, in 102 classes.

    The classes are the numbers from 1 to 102, as published.

    Args:
        root: the folder that holds ``jpg``, ``imagelabels.mat`` and ``setid.mat``.

    Raises:
        UserError: files are missing, malformed, or do not fit each other.
    """
    folder = native_path(root)
    labels = _numbers(folder, LABELS, "labels", CLASSES)
    lists = [_numbers(folder, SPLITS, name, len(labels)) for name in PARTS[train]]
    chosen = np.sort(np.concatenate(lists))
    names = [os.path.join("jpg", f"image_{number:05}.jpg") for number in chosen]
    present = _listing(os.path.join(folder, "jpg"))
    absent = next((name for name in names if os.path.basename(name) not in present), None)
    if absent is not None:
        raise UserError(
            f"data.root: {printable(os.path.join(folder, absent))}: no such file, but "
            f"{SPLITS} names it; unpack 102flowers.tgz here"
        )
    classes = tuple(str(number) for number in range(1, CLASSES + 1))
    return Files(folder, names, how, (labels[chosen - 1] - 1).tolist(), classes)


def _listing(folder: str) -> frozenset[str]:
    try:
        return frozenset(os.listdir(folder))
    except OSError as error:
        raise UserError(
            f"data.root: {printable(folder)}: {error.strerror}; unpack 102flowers.tgz here"
        ) from error


def _numbers(folder: str, name: str, variable: str, largest: int) -> NDArray[np.int64]:
    """One variable of a MATLAB file: whole numbers from 1 to ``largest``."""
    path = os.path.join(folder, name)
    try:
        if os.path.getsize(path) > MAX_BYTES:
            raise ValueError(f"longer than {MAX_BYTES} bytes")
        values = np.asarray(_content(path)[variable])
    except FileNotFoundError as error:
        raise UserError(
            f"data.root: {printable(path)}: {error.strerror}; put {LABELS} and {SPLITS} beside the "
            "folder jpg"
        ) from error
    except _MALFORMED as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"data.root: {printable(path)}: not {name} of Oxford Flowers-102 ({reason})"
        ) from error
    if values.dtype.kind not in "iuf" or not values.size:
        raise UserError(f"data.root: {printable(path)}: {variable}: expected numbers")
    numbers = values.ravel().astype(np.int64)
    if (numbers != values.ravel()).any() or not 1 <= numbers.min() <= numbers.max() <= largest:
        raise UserError(
            f"data.root: {printable(path)}: {variable}: expected whole numbers from 1 to {largest}"
        )
    return numbers


def _content(path: str) -> dict[str, Any]:
    """The variables of a MATLAB file of version 5; nothing in it is executed."""
    # Imported here: it takes a third of a second, and workers do not need it.
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    try:
        with open(path, "rb") as file:
            return dict(loadmat(file))
    except MatReadError as error:
        raise ValueError(str(error)) from error
