"""Reads files of named arrays from any source: npz and safetensors.

Nothing in a file is executed, and all that a file states is checked. A damaged or hostile file
raises one clear UserError.
"""

import lzma
import math
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from safetensors import SafetensorError, deserialize, safe_open

from triptych.core.contracts import Array, State
from triptych.core.errors import UserError
from triptych.core.files.tree import AGAIN

MALFORMED = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    tokenize.TokenError,
    SafetensorError,
    SyntaxError,
    EOFError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    OverflowError,
    RuntimeError,  # zipfile: encrypted, or packed in a way that it does not know
    MemoryError,
)
"""Exceptions of the parsers on malformed bytes."""

_npy: Any = np.lib.format
_deserialize: Any = deserialize
# Any: both are public, but only some versions annotate them.

NUMBERS = "biufc"
"""NumPy's kinds of types that hold only numbers."""

MAX_RATIO = 1032
"""Largest ratio that deflate can reach; a member with a larger one states a false size."""

TYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "U32": "uint32",
    "I32": "int32",
    "U64": "uint64",
    "I64": "int64",
    "F16": "float16",
    "F32": "float32",
    "F64": "float64",
    "BF16": "bfloat16",
}
"""safetensors' types -> NumPy's."""

ROOM = 100 * 2**20
"""Bytes that the packed members of a file of weights may unpack to, beyond the size of the file."""

SIGNATURES = {
    b"PK": "zip",
    b"\x80": "a pickle, which could run code and is never loaded",
    b"\x93NUMPY": "a single NumPy array without a name",
    b"\x89HDF": "an HDF5 file",
}


def read_file(path: Path) -> State:
    """All arrays of an npz or safetensors file. The content shows the format, not the suffix.

    Raises:
        UserError: the file has another format, is damaged, or holds anything but numbers.
    """
    if not path.is_file():
        raise UserError(f"{path}: {'not a file' if path.exists() else 'no such file'}")
    with _parsing(path), open(path, "rb") as stream:
        head = stream.read(9)
    kind = next((k for signature, k in SIGNATURES.items() if head.startswith(signature)), None)
    if kind == "zip":
        return read_npz(path, room=path.stat().st_size + ROOM)
    if head[8:] == b"{":
        return read_safetensors(path)
    content = kind or (f"it begins with {head!r}" if head else "an empty file")
    raise UserError(f"{path}: neither npz nor safetensors, but {content}")


def read_npz(path: Path, kinds: str = NUMBERS, room: int | None = None) -> State:
    """The arrays of a NumPy archive.

    Args:
        path: of the archive.
        kinds: NumPy's kinds of types that it may hold; "U" stands for texts.
        room: bytes that all packed members may unpack to; None: any number.

    Raises:
        UserError: names a member that holds anything but numbers, e.g. pickled objects.
    """
    arrays: State = {}
    with _parsing(path), zipfile.ZipFile(path) as archive:
        unpacked = 0
        for member in archive.infolist():
            name = member.filename.removesuffix(".npy")
            if name == member.filename or name in arrays:
                what = "twice" if name in arrays else "which is no array (a PyTorch file?)"
                raise UserError(f"{path}: not an npz file: it holds {member.filename!r}, {what}")
            _check_member(path, archive, member, kinds)
            unpacked += member.file_size if member.compress_type else 0
            if room is not None and unpacked > room:
                raise UserError(
                    f"{path}: {member.filename!r} unpacks to {member.file_size} bytes: refused as "
                    "a zip bomb; numpy.savez writes arrays unpacked"
                )
            with archive.open(member) as stream:
                array = _npy.read_array(stream, allow_pickle=False)
            arrays[name] = array.astype(array.dtype.newbyteorder("="), copy=False)
    return arrays


def _check_member(
    path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo, kinds: str
) -> None:
    """Raises UserError unless a member holds values of ``kinds``, as many as its size allows."""
    with archive.open(member) as stream:
        shape, _, dtype = npy_header(stream)
        size = stream.tell() + math.prod(shape) * dtype.itemsize
    if dtype.hasobject:
        raise UserError(
            f"{path}: {member.filename!r} holds pickled Python objects, which are never loaded"
        )
    if dtype.kind not in kinds:
        raise UserError(f"{path}: {member.filename!r} holds {dtype}, expected numbers")
    if size != member.file_size or size > MAX_RATIO * (member.compress_size + 1):
        raise UserError(
            f"{path}: {member.filename!r} is damaged: {member.file_size} bytes (packed: "
            f"{member.compress_size}) cannot hold {dtype} of shape {shape}"
        )


def npy_header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether by columns, and type of an array in NumPy's format; reads up to its values.

    Raises:
        ValueError: it is no such array, or of an unknown version.
    """
    # Version 3 differs only in the names of fields, and arrays with fields are refused.
    read = {(1, 0): _npy.read_array_header_1_0, (2, 0): _npy.read_array_header_2_0}
    version = _npy.read_magic(stream)
    if version not in read:
        raise ValueError(f"npy version {version}")
    shape, by_columns, dtype = read[version](stream)
    return shape, by_columns, dtype


def read_safetensors(path: Path) -> State:
    """The arrays of a safetensors file. NumPy lacks bfloat16, so that is widened to float32."""
    types = safetensors_types(path)
    with _parsing(path), safe_open(path, framework="np") as file:
        if "BF16" not in types.values():
            return {name: file.get_tensor(name) for name in types}
        entries = dict(_deserialize(path.read_bytes()))
        return {name: _array(entry) for name, entry in entries.items()}


def safetensors_types(path: Path) -> dict[str, str]:
    """Name -> type of each tensor of a safetensors file, as the file spells it.

    Raises:
        UserError: the file is damaged, or has a type that is not in ``TYPES``.
    """
    with _parsing(path), safe_open(path, framework="np") as file:
        types = {name: file.get_slice(name).get_dtype() for name in file.keys()}
    for name, kind in types.items():
        if kind not in TYPES:
            raise UserError(f"{path}: {name!r} holds {kind}, which is not supported")
    return types


def _array(entry: dict[str, Any]) -> Array:
    values: Array
    if entry["dtype"] == "BF16":
        # bfloat16 is the upper half of a float32: the widening is exact.
        upper = np.frombuffer(entry["data"], "<u2").astype(np.uint32)
        values = (upper << 16).view(np.float32)
    else:
        values = np.frombuffer(entry["data"], TYPES[entry["dtype"]])
    return values.reshape(entry["shape"])


@contextmanager
def _parsing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    except MALFORMED as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path}: damaged: {reason}; {AGAIN}") from error
