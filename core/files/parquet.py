"""Feature files as Apache Parquet; see ``core.files.features``."""

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
from pyarrow import parquet

from triptych.core.contracts import Array
from triptych.core.files.features import Header

GROUP = 2**25
"""Bytes of features in a row group, which is kept in memory until it is written."""
KEY = b"triptych"
"""Key of the file's metadata that holds classes, shapes and ``about``."""


class ParquetWriter:
    """See ``core.files.features.Writer``. Features are lists of a fixed size."""

    def __init__(self, path: Path, header: Header) -> None:
        self._path, self._header = path, header
        self._pending: list[Any] = []
        self._file: Any = None

    def append(self, columns: Mapping[str, Array]) -> None:
        """See ``core.files.features.Writer``."""
        table = pyarrow.table({name: _column(values) for name, values in columns.items()})
        if self._file is None:
            content = {
                "classes": self._header.classes,
                "about": self._header.about,
                "shapes": {name: values.shape[1:] for name, values in columns.items()},
            }
            schema = table.schema.with_metadata({KEY: json.dumps(content).encode()})
            self._file = parquet.ParquetWriter(self._path, schema)
        self._pending.append(table.cast(self._file.schema))
        if sum(rows.nbytes for rows in self._pending) >= GROUP:
            self._flush()

    def finish(self) -> None:
        """See ``core.files.features.Writer``."""
        self._flush()
        self._file.close()

    def close(self) -> None:
        """See ``core.files.features.Writer``."""
        if self._file is not None and self._file.is_open:
            with suppress(OSError):
                self._file.close()

    def _flush(self) -> None:
        self._file.write_table(pyarrow.concat_tables(self._pending).combine_chunks())
        self._pending.clear()


open_writer = ParquetWriter


def _column(values: Array) -> Any:
    if values.ndim == 1:
        return pyarrow.array(values.tolist() if values.dtype.kind == "U" else values)
    flat = pyarrow.array(np.ascontiguousarray(values).reshape(-1))
    return pyarrow.FixedSizeListArray.from_arrays(flat, int(np.prod(values.shape[1:])))


def read(path: Path) -> tuple[tuple[str, ...], str, dict[str, Array]]:
    """See ``core.files.features.FileFormat``."""
    table = parquet.read_table(path)
    extra = json.loads((table.schema.metadata or {})[KEY])
    columns = {}
    for name, shape in extra["shapes"].items():
        column = table.column(name).combine_chunks()
        if shape:
            columns[name] = column.flatten().to_numpy().reshape(-1, *shape)
        else:
            values = column.to_numpy(zero_copy_only=False)
            columns[name] = values.astype(np.str_) if values.dtype.kind == "O" else values
    return tuple(extra["classes"]), json.dumps(extra["about"]), columns
