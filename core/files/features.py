"""Feature files: names, labels and features of images, as npz, parquet or HDF5.

A file has these columns, with one row per image:

- ``name``: text, the image's path inside the data folder; unprintable characters are escaped.
- ``label``: int64, position in ``classes``; -1 for no label.
- ``held_out``: bool, whether the image is of the held-out split.
- ``final``, ``layer<i>``: (D,) or (1+L, D) numbers, see ``core.engine.Engine.embed``.

Beside them stand ``classes`` (texts) and ``about`` (one JSON object).
"""

import errno
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from triptych.core.contracts import Array
from triptych.core.errors import UserError
from triptych.core.files.arrays import MALFORMED
from triptych.core.files.writing import sync
from triptych.core.machine.interrupts import leave_tidily

CLOSED = frozenset(
    {errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.EROFS, errno.EISDIR}
)
"""Error numbers of a folder that is not there or takes no file."""

COLUMNS = ("name", "label", "held_out")
"""The columns that are no features."""

Append = Callable[[Mapping[str, Array]], None]
"""Adds rows to a file; see ``Writer.append``."""


@dataclass(frozen=True)
class Header:
    """What a feature file says beside its rows.

    Attributes:
        classes: names of the labels.
        about: how the features were made; plain JSON.
        name_width: length of the longest name.
    """

    classes: tuple[str, ...]
    about: Mapping[str, Any]
    name_width: int = 1


@dataclass(frozen=True)
class FeatureFile:
    """The content of a feature file.

    Attributes:
        path: of the file, for messages.
        classes: names of the labels.
        about: how the features were made.
        columns: name -> (N, ...) array; the columns ``COLUMNS`` and the features.
    """

    path: Path
    classes: tuple[str, ...]
    about: Mapping[str, Any]
    columns: Mapping[str, Array] = field(repr=False)

    @property
    def features(self) -> dict[str, Array]:
        """The columns that are features."""
        return {name: x for name, x in self.columns.items() if name not in COLUMNS}

    def half(self, *, held_out: bool) -> "FeatureFile":
        """The rows of one split; all rows if the file holds one split only."""
        rows = self.columns["held_out"] == held_out
        if rows.all() or not rows.any():
            return self
        chosen = {name: column[rows] for name, column in self.columns.items()}
        return FeatureFile(self.path, self.classes, self.about, chosen)


class Writer(Protocol):
    """A feature file while it is written. All methods raise OSError if that fails."""

    def append(self, columns: Mapping[str, Array]) -> None:
        """Adds rows: all columns, each of shape (n, ...), always with the same types."""

    def finish(self) -> None:
        """Completes the file."""

    def close(self) -> None:
        """Releases what is open or temporary. The file may be incomplete."""


class FileFormat(Protocol):
    """A module that writes and reads one format."""

    def open_writer(self, path: Path, header: Header) -> Writer:
        """A new file.

        Raises:
            OSError: the file cannot be written.
        """

    def read(self, path: Path) -> tuple[tuple[str, ...], str, dict[str, Array]]:
        """Classes, the JSON text of ``about``, and the columns.

        Raises:
            OSError, or one of ``core.files.arrays.MALFORMED``: the file is damaged or of another
                kind.
        """


class Entry(NamedTuple):
    """One format.

    Attributes:
        module: its module.
        library: the package that it needs; "": none but NumPy.
        extra: name of the extra that installs the package.
    """

    module: str
    library: str = ""
    extra: str = ""


FORMATS = {
    ".npz": Entry("npz"),
    ".parquet": Entry("parquet", "pyarrow", "parquet"),
    ".h5": Entry("hdf5", "h5py", "hdf5"),
}
"""Suffix -> format."""


def file_format(path: Path) -> FileFormat:
    """The format of a feature file, by its suffix.

    Raises:
        UserError: the suffix is unknown, or the library of the format is not installed.
    """
    if path.suffix not in FORMATS:
        raise UserError(f"{path}: a feature file ends in {', '.join(FORMATS)}; rename it")
    entry = FORMATS[path.suffix]
    if entry.library:
        try:
            import_module(entry.library)
        except ImportError as error:
            raise UserError(
                f"{path}: {entry.library} is not installed; run: pip install "
                f"'triptych[{entry.extra}]', or choose a file that ends in .npz"
            ) from error
    module: Any = import_module(f"triptych.core.files.{entry.module}")
    made: FileFormat = module
    return made


@contextmanager
def writing(path: Path, header: Header) -> Iterator[Append]:
    """Writes a feature file row by row in constant memory.

    The file appears under its name when it is whole. An error inside leaves an earlier file.

    Raises:
        UserError: as in ``file_format``, or the file cannot be written.
        SystemExit: there was a SIGTERM.
    """
    made = file_format(path)
    aside = path.with_name(f".{os.getpid()}.{path.name}")
    with leave_tidily(), ExitStack() as cleanup:
        cleanup.callback(_remove, aside)
        with _errors_of(path):
            writer = made.open_writer(aside, header)
        cleanup.callback(writer.close)

        def append(columns: Mapping[str, Array]) -> None:
            with _errors_of(path):
                writer.append(columns)

        yield append
        with _errors_of(path):
            writer.finish()
            sync(aside)
            os.replace(aside, path)


def _remove(path: Path) -> None:
    with suppress(OSError):
        path.unlink()


@contextmanager
def _errors_of(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or " ".join(str(error).split())
        full = "free some space or set --output to another disk"
        closed = "set --output to a file in a folder that exists and can be written"
        advice = closed if error.errno in CLOSED else full
        raise UserError(f"{path}: cannot write: {reason}; {advice}") from error


def read_features(path: Path) -> FeatureFile:
    """A feature file.

    Raises:
        UserError: as in ``file_format``, or the file is missing, damaged or of another kind.
    """
    if not path.is_file():
        raise UserError(f"{path}: {'not a file' if path.exists() else 'no such file'}")
    try:
        classes, about, columns = file_format(path).read(path)
        content = FeatureFile(path, classes, json.loads(about), columns)
    except (OSError, *MALFORMED) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{path}: not a feature file of tools/eval.py features, or damaged: {reason}"
        ) from error
    _check(content)
    return content


def _check(content: FeatureFile) -> None:
    """Raises UserError unless the columns are there, equally long and of their types."""
    if not isinstance(content.about, dict):
        raise UserError(f"{content.path}: not a feature file: about: expected a JSON object")
    kinds = {"name": "U", "label": "i", "held_out": "b"}
    count = len(content.columns.get("label", ()))
    for name in (*COLUMNS, *content.features):
        column = content.columns.get(name)
        if column is None or column.dtype.kind != kinds.get(name, "f") or len(column) != count:
            found = "nothing" if column is None else f"{column.dtype} {column.shape}"
            raise UserError(f"{content.path}: not a feature file: {name}: {found}")
    labels = content.columns["label"]
    if not count or labels.min() < -1 or labels.max() >= len(content.classes):
        raise UserError(
            f"{content.path}: no images, or labels beyond its {len(content.classes)} classes"
        )
    for name, column in content.features.items():
        if column.ndim not in (2, 3) or not np.isfinite(column).all():
            raise UserError(
                f"{content.path}: {name}: {column.shape}: no finite features; export it again"
            )
