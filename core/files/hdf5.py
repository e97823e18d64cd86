"""Feature files as HDF5; see ``core.files.features``."""

import io
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from triptych.core.contracts import Array
from triptych.core.files.features import Header

CHUNK = 2**20
"""Bytes of a chunk, the unit in which HDF5 stores and reads a dataset."""


class Hdf5Writer:
    """See ``core.files.features.Writer``. Each column is a dataset that grows."""

    def __init__(self, path: Path, header: Header) -> None:
        self._sink = _Sink(path, "w+")
        self._file: Any = h5py.File(self._sink, "w")
        classes = list(header.classes)
        self._file.create_dataset("classes", data=classes, dtype=h5py.string_dtype())
        self._file["about"] = json.dumps(header.about)

    def append(self, columns: Mapping[str, Array]) -> None:
        """See ``core.files.features.Writer``."""
        for name, values in columns.items():
            dataset = self._file[name] if name in self._file else self._dataset(name, values)
            before = len(dataset)
            dataset.resize(before + len(values), axis=0)
            dataset[before:] = values.astype(object) if values.dtype.kind == "U" else values
        self._sink.check()

    def finish(self) -> None:
        """See ``core.files.features.Writer``."""
        self._file.close()
        self._sink.close()
        self._sink.check()

    def close(self) -> None:
        """See ``core.files.features.Writer``."""
        self._file.close()
        self._sink.close()

    def _dataset(self, name: str, values: Array) -> Any:
        shape = values.shape[1:]
        width = max(math.prod(shape) * values.dtype.itemsize, 64)
        return self._file.create_dataset(
            name,
            shape=(0, *shape),
            maxshape=(None, *shape),
            chunks=(max(CHUNK // width, 1), *shape),
            dtype=h5py.string_dtype() if values.dtype.kind == "U" else values.dtype,
        )


open_writer = Hdf5Writer


class _Sink(io.FileIO):
    """A file that keeps the error of its first failed write for ``check``, and takes no more then.

    The library writes what it holds back when its objects are deleted, where Python can only print
    an error.
    """

    error: OSError | None = None

    def write(self, data: Any) -> int:
        """Writes all of ``data``."""
        rest = memoryview(data).cast("B")
        size = len(rest)
        while len(rest) and self.error is None:
            try:
                rest = rest[super().write(rest) :]
            except OSError as error:
                self.error = error
        return size

    def truncate(self, size: int | None = None) -> int:
        """Sets the length of the file."""
        if self.error is None:
            try:
                return super().truncate(size)
            except OSError as error:
                self.error = error
        return size or 0

    def check(self) -> None:
        """Raises the error of the first failed write."""
        if self.error is not None:
            raise self.error


def read(path: Path) -> tuple[tuple[str, ...], str, dict[str, Array]]:
    """See ``core.files.features.FileFormat``."""
    with h5py.File(path) as file:
        classes = tuple(file["classes"].asstr()[...].tolist())
        columns = {
            name: dataset.asstr()[...].astype(np.str_)
            if h5py.check_string_dtype(dataset.dtype)
            else dataset[...]
            for name, dataset in file.items()
            if name not in ("classes", "about")
        }
        return classes, str(file["about"].asstr()[()]), columns
