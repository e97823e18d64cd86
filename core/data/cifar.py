"""Reads CIFAR-10 and CIFAR-100 from their unpacked files, of the python or the binary version."""

import os
from collections.abc import Callable
from typing import IO, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from triptych.core.data.cifar_pickles import unpickled
from triptych.core.data.decode import Decoding
from triptych.core.data.source import Arrays, native_path
from triptych.core.errors import UserError, printable

T = TypeVar("T")

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


class Kind(NamedTuple):
    """The files of one of the two data sets, and one kind of labels in them.

    Attributes:
        train: names of the training files; those of the binary version end in ".bin".
        test: names of the held-out files.
        folders: names of the folders that the two archives unpack to.
        key: name of the labels in the python version.
        column: place of the label among the ``columns`` bytes before the pixels (binary version).
        classes: number of classes.
    """

    name: str
    title: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    folders: tuple[str, str]
    key: str
    column: int
    columns: int
    classes: int


TEN = Kind(
    "cifar10",
    "CIFAR-10",
    TRAIN,
    TEST,
    ("cifar-10-batches-py", "cifar-10-batches-bin"),
    "labels",
    column=0,
    columns=1,
    classes=10,
)
HUNDRED = {
    labels: Kind(
        "cifar100",
        "CIFAR-100",
        ("train",),
        ("test",),
        ("cifar-100-python", "cifar-100-binary"),
        f"{labels}_labels",
        column=column,
        columns=2,
        classes=classes,
    )
    for labels, column, classes in (("coarse", 0, 20), ("fine", 1, 100))
}
"""``data.labels`` -> the files of CIFAR-100 with these labels."""


def cifar10(root: str, how: Decoding, *, train: bool) -> Arrays:
    """50 000 training or 10 000 held-out images, 32 by 32.

    Args:
        root: the folder of the files, or its parent folder.

    Raises:
        UserError: files are missing, malformed or no files of CIFAR-10.
    """
    folder, suffix = _locate(native_path(root), TEN)
    return _images(folder, suffix, TEN, CLASSES, how, train=train)


def cifar100(root: str, labels: str, how: Decoding, *, train: bool) -> Arrays:
    """50 000 training or 10 000 held-out images, 32 by 32, of 100 classes in 20 groups.

    Args:
        root: the folder of the files, or its parent folder.
        labels: "fine", the 100 classes, or "coarse", the 20 groups.

    Raises:
        UserError: files are missing, malformed or no files of CIFAR-100.
    """
    kind = HUNDRED[labels]
    folder, suffix = _locate(native_path(root), kind)
    path = os.path.join(folder, f"{labels}_label_names.txt" if suffix else "meta")
    names = _parsed(path, kind, lambda file: _names(file, kind, binary=bool(suffix)))
    return _images(folder, suffix, kind, names, how, train=train)


def _images(
    folder: str, suffix: str, kind: Kind, classes: tuple[str, ...], how: Decoding, *, train: bool
) -> Arrays:
    files = kind.train if train else kind.test
    parts = [_read(os.path.join(folder, name + suffix), kind) for name in files]
    rows = np.concatenate([rows for rows, _ in parts])
    labels = np.concatenate([labels for _, labels in parts])
    pixels = np.ascontiguousarray(rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    return Arrays(f"{kind.name}/{'train' if train else 'test'}", pixels, labels, classes, how)


def _locate(root: str, kind: Kind) -> tuple[str, str]:
    """The folder that holds the files, and the ending of their names."""
    first = kind.train[0]
    for folder in (root, *(os.path.join(root, name) for name in kind.folders)):
        for suffix in ("", ".bin"):
            if os.path.isfile(os.path.join(folder, first + suffix)):
                return folder, suffix
    archives = [f"{kind.title.lower()}-{version}.tar.gz" for version in ("python", "binary")]
    raise UserError(
        f"data.root: {printable(root)}: neither {first} nor {first}.bin is here; unpack "
        f"{' or '.join(archives)} into this folder"
    )


_Rows = tuple[NDArray[np.uint8], NDArray[np.int64]]
"""Rows (N, 3072) and labels (N,) of one file."""


def _read(path: str, kind: Kind) -> _Rows:
    read = _read_binary if path.endswith(".bin") else _read_pickle
    rows, labels = _parsed(path, kind, lambda file: read(file, kind))
    fit = len(rows) == len(labels) > 0 and 0 <= labels.min() <= labels.max() < kind.classes
    if not fit:
        raise UserError(
            f"data.root: {printable(path)}: not a {kind.title} file (its labels do not fit)"
        )
    return rows, labels


def _parsed(path: str, kind: Kind, parse: Callable[[IO[bytes]], T]) -> T:
    """What ``parse`` makes of a file.

    Raises:
        UserError: the file cannot be read, or ``parse`` finds it malformed.
    """
    try:
        with open(path, "rb") as file:
            return parse(file)
    except OSError as error:
        raise UserError(f"data.root: {printable(path)}: {error.strerror}") from error
    except _MALFORMED as error:
        raise UserError(
            f"data.root: {printable(path)}: not a {kind.title} file ({error})"
        ) from error


def _names(file: IO[bytes], kind: Kind, *, binary: bool) -> tuple[str, ...]:
    """The names of the classes: one per line, or a list in a dictionary."""
    if binary:
        names = [line.strip() for line in file.read(10**6).decode().splitlines() if line.strip()]
    else:
        content = unpickled(file)
        names = [name.decode() for name in content[f"{kind.key[:-1]}_names".encode()]]
    if len(names) != kind.classes:
        raise ValueError(f"{len(names)} names, expected {kind.classes}")
    return tuple(names)


def _read_binary(file: IO[bytes], kind: Kind) -> _Rows:
    """Each row is one or two bytes of labels and 3072 of pixels."""
    data = np.frombuffer(file.read(), np.uint8)
    size = kind.columns + PIXELS
    if data.size % size:
        raise ValueError(f"{data.size} bytes are not whole rows of {size}")
    rows = data.reshape(-1, size)
    return rows[:, kind.columns :], rows[:, kind.column].astype(np.int64)


def _read_pickle(file: IO[bytes], kind: Kind) -> _Rows:
    """A dictionary with ``data`` (N, 3072) uint8 and a list of N labels."""
    content = unpickled(file)
    data, labels = content[b"data"], np.array(content[kind.key.encode()])
    if not isinstance(data, np.ndarray) or data.shape[1:] != (PIXELS,):
        raise ValueError(f"data: expected rows of {PIXELS} bytes")
    if labels.dtype.kind != "i" or labels.ndim != 1:
        raise ValueError("labels: expected a list of integers")
    return data, labels.astype(np.int64)


_MALFORMED = (
    AttributeError,
    EOFError,
    IndexError,
    KeyError,
    MemoryError,
    OverflowError,
    TypeError,
    ValueError,
)
"""Exceptions of the parsers on malformed bytes."""
