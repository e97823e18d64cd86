"""Reads the parquet files in which Hugging Face publishes images, with the pyarrow package.

A row holds an image file in the column ``image`` (or ``img``): its bytes, or a record with a field
``bytes``. The column of the labels holds numbers or names. The names of numbers stand in the file's
metadata, under ``huggingface``.
"""

import json
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from triptych.core.data.archives import shards
from triptych.core.data.classes import label_classes
from triptych.core.data.decode import DamagedImage, Decoding, decode_bytes
from triptych.core.data.source import UNLABELLED, Labelled
from triptych.core.errors import UserError, printable

IMAGES = ("image", "img")
"""Names that the column of the images has."""
LABELS = ("label", "labels", "fine_label")
"""Names that the column of the labels has, if ``data.labels`` gives none."""

CACHED = 2**28
"""Bytes of images that a process keeps. Images are read by row groups, which hold many of them."""

_MALFORMED = (
    IndexError,
    KeyError,
    MemoryError,
    NotImplementedError,
    OSError,
    OverflowError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""Exceptions of pyarrow's reader on malformed files."""


class Group(NamedTuple):
    """A row group: the number of its file, its number there, and its first row there."""

    file: int
    number: int
    row: int


class Rows(Labelled):
    """The images of some parquet files; see ``Source``."""

    def __init__(
        self,
        paths: Sequence[str],
        groups: Sequence[Group],
        ends: NDArray[np.int64],
        column: str,
        labels: NDArray[np.int64] | None,
        classes: tuple[str, ...],
        notes: Sequence[str],
        how: Decoding,
    ) -> None:
        """Images in the order of the files.

        Args:
            groups: the row groups.
            ends: (G,) number of images up to the end of each group.
            column: the path of the column of bytes, e.g. "image.bytes".
        """
        super().__init__(labels, classes, notes)
        self._paths, self._groups, self._ends = tuple(paths), tuple(groups), ends
        self._column, self._how = column, how
        self._kept: dict[int, Any] = {}

    def __len__(self) -> int:
        """How many images."""
        return int(self._ends[-1])

    def __getstate__(self) -> dict[str, Any]:
        """Worker processes read for themselves."""
        return {**vars(self), "_kept": {}}

    def image(self, index: int) -> Image.Image:
        """See ``Source``."""
        group, row = self._place(index)
        name = self.name(index)
        try:
            value = self._values(group)[row].as_py()
        except MemoryError:
            raise
        except _MALFORMED as error:
            raise DamagedImage(f"{printable(name)}: cannot be read: {_line(error)}") from error
        content = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(content, bytes):
            raise DamagedImage(f"{printable(name)}: the row holds no bytes of an image")
        return decode_bytes(content, name, self._how)

    def name(self, index: int) -> str:
        """``path[row]``."""
        group, row = self._place(index)
        return f"{self._paths[self._groups[group].file]}[{self._groups[group].row + row}]"

    def key(self, index: int) -> str:
        """``file name[row]``."""
        return os.path.basename(self.name(index))

    def _place(self, index: int) -> tuple[int, int]:
        """The group that holds an image, and its row in the group."""
        group = int(np.searchsorted(self._ends, index, side="right"))
        return group, index - (int(self._ends[group - 1]) if group else 0)

    def _values(self, group: int) -> Any:
        """The column of one row group; the groups read last are kept."""
        if group not in self._kept:
            file, number, _ = self._groups[group]
            table = _open(self._paths[file]).read_row_group(
                number, columns=[self._column], use_threads=False
            )
            column = table.column(0)
            while self._kept and _size(self._kept) + column.nbytes > CACHED:
                del self._kept[next(iter(self._kept))]
            self._kept[group] = column
        return self._kept[group]


def parquet(root: str, label: str | None, how: Decoding, key: str) -> Rows:
    """The images of the parquet files that ``root`` names.

    Args:
        root: a folder of parquet files, a pattern, or one file.
        label: name of the column of the labels; None: one of ``LABELS``, if there is one.
        key: the spec's key that gives ``root``, for messages.

    Raises:
        UserError: pyarrow is not installed, or files are missing, damaged or without images.
    """
    paths = shards(root, ".parquet", key)
    parts = [_part(path, label, f"{key}: {printable(path)}") for path in paths]
    for path, part in zip(paths, parts, strict=True):
        if (part.column, part.names, part.label) != parts[0][:3]:
            raise UserError(
                f"{key}: {printable(path)}: other columns or classes than in {printable(paths[0])};"
                " name files of one data set"
            )
    groups = [
        Group(file, number, sum(part.rows[:number]))
        for file, part in enumerate(parts)
        for number in range(len(part.rows))
    ]
    ends = np.cumsum([rows for part in parts for rows in part.rows], dtype=np.int64)
    if not len(ends) or not ends[-1]:
        raise UserError(f"{key}: {printable(root)}: no rows in {len(paths)} parquet files")
    labels, classes = _classes([part.values for part in parts], parts[0].names, key, root)
    size = sum(part.size for part in parts)
    notes = [_slow(key, root, size, len(groups), int(ends[-1]))] if size > CACHED else []
    return Rows(paths, groups, ends, parts[0].column, labels, classes, notes, how)


class _Part(NamedTuple):
    """One file.

    Attributes:
        column: path of the column of bytes.
        names: of the classes; empty if the file states none.
        label: name of the column of the labels, or None.
        values: the labels, numbers or texts; None if there are none.
        rows: number of images of each row group.
        size: bytes of all images.
    """

    column: str
    names: tuple[str, ...]
    label: str | None
    values: list[Any] | None
    rows: list[int]
    size: int


def _part(path: str, label: str | None, at: str) -> _Part:
    try:
        file = _open(path)
        schema, metadata = file.schema_arrow, file.metadata
        column = _image_column(schema, at)
        if label is not None and label not in schema.names:
            raise UserError(
                f"{at}: no column {printable(label)} (data.labels); there are "
                f"{printable(', '.join(schema.names))}"
            )
        label = label or next((name for name in LABELS if name in schema.names), None)
        values = None if label is None else file.read(columns=[label]).column(0).to_pylist()
        groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
        rows = [int(group.num_rows) for group in groups]
        size = sum(_column_size(group, column) for group in groups)
        names = _names(schema.metadata or {}, label)
    except _MALFORMED as error:
        raise UserError(f"{at}: not a whole parquet file ({_line(error)})") from error
    if min(rows, default=0) < 0 or (values is not None and len(values) != sum(rows)):
        raise UserError(f"{at}: not a whole parquet file (its numbers of rows do not fit)")
    return _Part(column, names, label, values, rows, size)


def _open(path: str) -> Any:
    """An open parquet file."""
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise UserError(
            "data.name: parquet needs the package pyarrow, which is not installed; "
            "pip install 'triptych[parquet]' installs it"
        ) from error
    return ParquetFile(path)


def _image_column(schema: Any, at: str) -> str:
    """The path of the column with the bytes of the images."""
    for name in IMAGES:
        if name in schema.names:
            kind = str(schema.field(name).type)
            if kind in ("binary", "large_binary"):
                return name
            if kind.startswith("struct<") and "bytes: " in kind:
                return f"{name}.bytes"
    raise UserError(
        f"{at}: no column {' or '.join(IMAGES)} with the bytes of images; there are "
        f"{printable(', '.join(schema.names))}"
    )


def _names(metadata: dict[bytes, bytes], label: str | None) -> tuple[str, ...]:
    """The names of the classes as Hugging Face's datasets library writes them."""
    feature = json.loads(metadata.get(b"huggingface", b"{}"))
    for name in ("info", "features", label, "names"):
        feature = feature.get(name, {}) if isinstance(feature, dict) else {}
    return tuple(map(str, feature))


def _classes(
    parts: Sequence[list[Any] | None], names: tuple[str, ...], key: str, root: str
) -> tuple[NDArray[np.int64] | None, tuple[str, ...]]:
    """The labels of all images and their classes; (None, ()) if there are none."""
    values = [value for part in parts if part is not None for value in part]
    if not values:
        return None, ()
    at = f"{key}: {printable(root)}"
    if not all(value is None or type(value) in (int, str) for value in values):
        raise UserError(f"{at}: the labels are neither whole numbers nor texts; set data.labels")
    texts = ["" if value in (None, -1) else str(value) for value in values]
    classes = tuple(map(str, range(len(names)))) if names else label_classes(texts)
    numbers = {"": UNLABELLED, **{name: number for number, name in enumerate(classes)}}
    beyond = next((text for text in texts if text not in numbers), None)
    if beyond is not None:
        raise UserError(
            f"{at}: label {printable(beyond)} is none of the {len(names)} classes in the metadata"
        )
    return np.array([numbers[text] for text in texts], np.int64), names or classes


def _column_size(group: Any, column: str) -> int:
    columns = [group.column(number) for number in range(group.num_columns)]
    return sum(int(c.total_uncompressed_size) for c in columns if c.path_in_schema == column)


def _size(columns: dict[int, Any]) -> int:
    return sum(int(column.nbytes) for column in columns.values())


def _slow(key: str, root: str, size: int, groups: int, count: int) -> str:
    """A line about the cost of single images in large row groups."""
    return (
        f"{key}: {printable(root)}: each image reads its whole row group, about "
        f"{-(-count // groups)} images and {size // groups // 2**20} MiB; image files or "
        "WebDataset tars are faster"
    )


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
