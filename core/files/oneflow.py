"""Reads the folders that ``oneflow.save`` and LiBai write, without OneFlow.

A folder holds ``pickled_data``, where each tensor is named by a path, and for each tensor a folder
with ``meta`` (text: shape and type) and ``out`` (the values).
"""

import os
import re
import stat
from pathlib import Path
from typing import Any

import numpy as np

from triptych.core.errors import printable
from triptych.core.files.constructors import NUMPY, PLAIN, size_of, table
from triptych.core.files.machine import Known
from triptych.core.files.pickles import load
from triptych.core.files.tree import Damaged, Malformed, Node, Pending, Stored, settled
from triptych.core.files.zips import mapped

PICKLE = "pickled_data"

LAST = "last_checkpoint"
"""File in which LiBai names its newest folder."""

TYPES = {
    "kFloat": "float32",
    "kDouble": "float64",
    "kFloat16": "float16",
    "kBFloat16": "bfloat16",
    "kInt8": "int8",
    "kInt16": "int16",
    "kInt32": "int32",
    "kInt64": "int64",
    "kUInt8": "uint8",
    "kBool": "bool",
    "kChar": "int8",
}
"""OneFlow's names of types -> NumPy's, and bfloat16."""

META = re.compile(r"\s*shape\s*\{((?:\s*dim\s*:\s*\d{1,18})*)\s*\}\s*data_type\s*:\s*(\w{1,40})\s*")

MAX_META = 4096
"""Bytes of a ``meta``."""


class _Stub(Pending):
    """Stands for a tensor in a pickle, whose state says in which folder the values are."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path: Any = None

    def build(self, state: Any) -> None:
        """Takes the state."""
        self.path = state.get("path") if isinstance(state, dict) else None

    def finished(self) -> Stored:
        """See ``core.files.tree.Pending``."""
        if not isinstance(self.path, str) or not re.fullmatch(r"[\w-]{1,200}", self.path):
            raise Damaged(f"a tensor in the folder {ascii(self.path)[:100]}, which is refused")
        return _tensor(self.folder / self.path)


def _tensor(folder: Path) -> Stored:
    if folder.is_symlink():
        raise Malformed(f"{printable(folder.name)} is a symbolic link: copy the files themselves")
    text = bytes(_plain(folder / "meta")[: MAX_META + 1])
    found = META.fullmatch(text.decode("latin1"))
    if not found or len(text) > MAX_META or found[2] not in TYPES:
        raise Damaged(f"{printable(folder.name)}/meta is damaged, or of an unknown type")
    shape = tuple(int(n) for n in re.findall(r"\d+", found[1]))
    dtype = TYPES[found[2]]
    data = _plain(folder / "out")
    kind = np.dtype("uint16" if dtype == "bfloat16" else dtype)
    if size_of(shape) * kind.itemsize != len(data):
        raise Malformed(
            f"{printable(folder.name)}/out has {len(data)} bytes, which is no {dtype} of shape "
            f"{shape}: fetch the folder again"
        )
    values = np.frombuffer(data, kind).reshape(shape) if len(data) else np.zeros(shape, kind)
    return Stored.of(values, dtype)


def _plain(path: Path) -> memoryview:
    """The bytes of a plain file, not of a link or a device."""
    try:
        if not stat.S_ISREG(os.lstat(path).st_mode):
            raise Malformed(f"{printable(path.name)} is no plain file: copy the files themselves")
        return mapped(path)
    except FileNotFoundError as error:
        where = printable(f"{path.parent.name}/{path.name}")
        raise Malformed(f"{where} is missing: fetch the folder again") from error


def is_folder(path: Path) -> bool:
    """Whether ``oneflow.save`` wrote this folder."""
    return (path / PICKLE).is_file()


def read_folder(path: Path) -> Node:
    """The tree of a folder.

    Raises:
        Malformed: a file is damaged, or uses what is not allowed.
        OSError: a file cannot be read.
    """
    known = table(
        Known("oneflow.Tensor", lambda *_: _Stub(path)),
        Known("oneflow.nn.Parameter", lambda *_: _Stub(path)),
        Known("oneflow.nn.parameter.Parameter", lambda *_: _Stub(path)),
    )
    data = _plain(path / PICKLE)
    tree, end = load(data, PLAIN | NUMPY | known)
    if end != len(data) or not isinstance(tree, dict) or "data" not in tree:
        raise Damaged(f"{PICKLE} is no file of oneflow.save")
    if tree.get("protocol_version") != 1:
        raise Damaged(f"{PICKLE} has protocol version {tree.get('protocol_version')!r:.40}, not 1")
    return settled(tree["data"])


def last_folder(path: Path) -> Path | None:
    """The folder that LiBai's ``last_checkpoint`` names, if there is one."""
    if not (path / LAST).is_file():
        return None
    name = bytes(_plain(path / LAST)[:200]).decode("utf-8", "replace").strip()
    if not re.fullmatch(r"[\w.-]+", name) or name.startswith(".") or not (path / name).is_dir():
        raise Damaged(f"{LAST} names {ascii(name)[1:-1]!r}, which is no folder here")
    return path / name


def parts(path: Path) -> dict[str, Path]:
    """Name -> folder of ``oneflow.save`` below this one, e.g. LiBai's model and optimizer."""
    return {child.name: child for child in sorted(path.iterdir()) if is_folder(child)}
