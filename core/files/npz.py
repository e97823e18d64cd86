"""Feature files as NumPy archives; see ``core.files.features``."""

import json
import shutil
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from triptych.core.contracts import Array
from triptych.core.files.arrays import NUMBERS, read_npz
from triptych.core.files.features import Header

_npy: Any = np.lib.format
# Any: public, but only some versions annotate it.
COPIED = 2**20
"""Bytes that are copied at once."""


class NpzWriter:
    """See ``core.files.features.Writer``.

    An archive holds one array after the other, and each states its length first. So the rows are
    collected in one raw file per array, beside the archive.
    """

    def __init__(self, path: Path, header: Header) -> None:
        self._path, self._header = path, header
        self._folder = TemporaryDirectory(prefix=f"{path.name}.", dir=path.parent)
        self._columns: dict[str, _Column] = {}

    def append(self, columns: Mapping[str, Array]) -> None:
        """See ``core.files.features.Writer``."""
        for name, values in columns.items():
            if name == "name":
                values = values.astype(f"U{self._header.name_width}")
            column = self._columns.setdefault(name, _Column(values.dtype, values.shape[1:]))
            column.count += len(values)
            with open(self._raw(name), "ab") as file:
                file.write(np.ascontiguousarray(values).tobytes())

    def finish(self) -> None:
        """See ``core.files.features.Writer``."""
        texts = {"classes": self._header.classes, "about": json.dumps(self._header.about)}
        with zipfile.ZipFile(self._path, "w") as archive:
            for name, column in self._columns.items():
                _move(archive, self._raw(name), column)
            for name, text in texts.items():
                with archive.open(f"{name}.npy", "w") as member:
                    _npy.write_array(member, np.array(text, np.str_), allow_pickle=False)

    def close(self) -> None:
        """See ``core.files.features.Writer``."""
        self._folder.cleanup()

    def _raw(self, name: str) -> Path:
        return Path(self._folder.name) / name


@dataclass
class _Column:
    """Type, shape and number of the rows in one raw file."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    count: int = 0


def _move(archive: zipfile.ZipFile, raw: Path, column: _Column) -> None:
    """Moves a raw file into the archive."""
    description = {
        "descr": _npy.dtype_to_descr(column.dtype),
        "fortran_order": False,
        "shape": (column.count, *column.shape),
    }
    with archive.open(f"{raw.name}.npy", "w", force_zip64=True) as member, raw.open("rb") as file:
        _npy.write_array_header_1_0(member, description)
        shutil.copyfileobj(file, member, COPIED)
    raw.unlink()


open_writer = NpzWriter


def read(path: Path) -> tuple[tuple[str, ...], str, dict[str, Array]]:
    """See ``core.files.features.FileFormat``."""
    columns = read_npz(path, kinds=NUMBERS + "U")
    classes, about = columns.pop("classes"), columns.pop("about")
    return tuple(classes.tolist()), str(about), columns
