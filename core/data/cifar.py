"""Reads CIFAR-10 from its unpacked files, of the python or the binary version.

The files of the python version are pickles. The unpickler here knows only byte arrays, strings,
numbers and containers, so that no file can run code.
"""

import os
import pickle
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from triptych.core.data.decode import Decoding
from triptych.core.data.source import Arrays, native_path
from triptych.core.errors import UserError, printable

CLASSES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)
TRAIN = tuple(f"data_batch_{number}" for number in range(1, 6))
TEST = ("test_batch",)
PIXELS = 3 * 32 * 32
"""Bytes of one image: the red plane, then green, then blue."""


def cifar10(root: str, how: Decoding, *, train: bool) -> Arrays:
    """50 000 training or 10 000 held-out images, 32 by 32.

    Args:
        root: the folder of the files, or its parent folder.

    Raises:
        UserError: files are missing, malformed or no files of CIFAR-10.
    """
    folder, suffix = _locate(native_path(root))
    parts = [_read(os.path.join(folder, name + suffix)) for name in (TRAIN if train else TEST)]
    rows = np.concatenate([rows for rows, _ in parts])
    labels = np.concatenate([labels for _, labels in parts])
    pixels = np.ascontiguousarray(rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    return Arrays("cifar10/train" if train else "cifar10/test", pixels, labels, CLASSES, how)


def _locate(root: str) -> tuple[str, str]:
    """The folder that holds the files, and the ending of their names."""
    for folder in (root, *(os.path.join(root, f"cifar-10-batches-{k}") for k in ("py", "bin"))):
        for suffix in ("", ".bin"):
            if os.path.isfile(os.path.join(folder, TRAIN[0] + suffix)):
                return folder, suffix
    raise UserError(
        f"data.root: {printable(root)}: neither data_batch_1 nor data_batch_1.bin is here; unpack "
        "cifar-10-python.tar.gz or cifar-10-binary.tar.gz into this folder"
    )


def _read(path: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Rows (N, 3072) uint8 and labels (N,) of one file."""
    try:
        with open(path, "rb") as file:
            rows, labels = _read_binary(file) if path.endswith(".bin") else _read_pickle(file)
    except OSError as error:
        raise UserError(f"data.root: {printable(path)}: {error.strerror}") from error
    except _MALFORMED as error:
        raise UserError(f"data.root: {printable(path)}: not a CIFAR-10 file ({error})") from error
    if len(rows) == 0 or len(rows) != len(labels) or not 0 <= labels.min() <= labels.max() < 10:
        raise UserError(
            f"data.root: {printable(path)}: not a CIFAR-10 file (its labels do not fit)"
        )
    return rows, labels


def _read_binary(file: IO[bytes]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Each row is one byte of label and 3072 of pixels."""
    data = np.frombuffer(file.read(), np.uint8)
    if data.size % (1 + PIXELS):
        raise ValueError(f"{data.size} bytes are not whole rows of {1 + PIXELS}")
    rows = data.reshape(-1, 1 + PIXELS)
    return rows[:, 1:], rows[:, 0].astype(np.int64)


# ----------------------------------------------------------------------------- the python version

_MALFORMED = (
    AttributeError,
    EOFError,
    IndexError,
    KeyError,
    MemoryError,
    OverflowError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
)


def _read_pickle(file: IO[bytes]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """A dictionary with ``data`` (N, 3072) uint8 and ``labels``, a list of N numbers."""
    content = _Unpickler(file, encoding="bytes").load()
    if not isinstance(content, dict):
        raise ValueError("no dictionary in it")
    data, labels = content[b"data"], np.array(content[b"labels"])
    if not isinstance(data, _Bytes) or data.rows.shape[1:] != (PIXELS,):
        raise ValueError(f"data: expected rows of {PIXELS} bytes")
    if labels.dtype.kind != "i" or labels.ndim != 1:
        raise ValueError("labels: expected a list of integers")
    return data.rows, labels.astype(np.int64)


class _Bytes:
    """Stands in for a NumPy array of bytes, the only kind of array in these files."""

    rows: NDArray[np.uint8]

    def __init__(self, *_: Any) -> None:
        """Ignores the arguments, which are placeholders: ``__setstate__`` gets the content."""

    def __setstate__(self, state: tuple[Any, tuple[int, ...], "_Dtype", bool, bytes]) -> None:
        _, shape, dtype, by_columns, data = state
        if not isinstance(dtype, _Dtype):
            raise pickle.UnpicklingError("an array without a type is refused")
        self.rows = np.frombuffer(data, np.uint8).reshape(shape, order="F" if by_columns else "C")


class _Dtype:
    """Stands in for ``numpy.dtype``; refuses all types but bytes."""

    def __init__(self, code: Any, *_: Any) -> None:
        if code not in (b"u1", "u1"):
            raise pickle.UnpicklingError(f"an array of type {code!r} is refused")

    def __setstate__(self, state: Any) -> None:
        """Ignores byte order and field names, which bytes do not have."""


def _latin1(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"encoding {encoding!r} is refused")
    return text.encode("latin1")


_KNOWN = {
    ("numpy", "ndarray"): _Bytes,
    ("numpy", "dtype"): _Dtype,
    ("numpy.core.multiarray", "_reconstruct"): _Bytes,
    ("numpy._core.multiarray", "_reconstruct"): _Bytes,
    ("_codecs", "encode"): _latin1,  # Python 3 writes bytes so in an old protocol
}


class _Unpickler(pickle.Unpickler):
    """Builds byte arrays and plain containers; any other name in the file is refused."""

    def find_class(self, module: str, name: str) -> Any:
        """Called for each name that the file imports."""
        try:
            return _KNOWN[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it wants to run {module}.{name}: refused") from None
