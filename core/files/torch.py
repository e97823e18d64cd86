"""Reads what ``torch.save`` writes, zip and legacy containers, without PyTorch.

A tensor's values are a view of the mapped file, in the strides that the file states.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from triptych.core.contracts import Array
from triptych.core.files.constructors import PLAIN, size_of, table
from triptych.core.files.machine import REMEDY, Known
from triptych.core.files.pickles import load
from triptych.core.files.tree import (
    Damaged,
    Malformed,
    Node,
    Pending,
    Stored,
    bits_type,
    settled,
    unchecked,
)
from triptych.core.files.zips import Archive

STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
}
"""PyTorch's class of a storage -> type of its values."""

TYPES = (*STORAGES.values(), "uint16", "uint32", "uint64")
"""Types whose PyTorch name is NumPy's, and bfloat16."""

SYNONYMS = {"float": "float32", "double": "float64", "half": "float16", "long": "int64"}

MAGIC = bytes.fromhex("6cfc9c46f9206aa85019")
"""Begins a legacy file, as an integer of ten bytes."""

MAX_COPIES = 8
"""All tensors together may take as many times the size of the file: shared tensors count twice."""

SMALL = 64 * 2**20
"""Bytes that all tensors may take in any case."""


@dataclass(eq=False)
class Storage:
    """Values that tensors share.

    Attributes:
        key: its name in the file.
        dtype: type of the values; "" until a tensor names it.
        count: number of values; of bytes if ``dtype`` is "".
        data: the bytes, once they are found.
        check: compares them with their checksum, if there is one.
        checksum: CRC-32 of the bytes, if the file has it.
    """

    key: str
    dtype: str
    count: int
    data: memoryview | None = None
    check: Callable[[], None] = unchecked
    checksum: int | None = None

    def verify(self) -> None:
        """See ``Stored.verify``. Tensors that share the values have them checked once."""
        check, self.check = self.check, unchecked
        check()


@dataclass(eq=False)
class Tensor(Pending):
    """A tensor before its storage is found."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    order: str = "<"

    def finished(self) -> Stored:
        """See ``core.files.tree.Pending``; places beyond the storage raise Malformed."""
        storage = self.storage
        if storage.data is None:
            raise Damaged(f"the storage {storage.key[:40]!r} of a tensor is missing")
        kind = np.dtype(bits_type(self.dtype))
        available = len(storage.data) // kind.itemsize
        reach = sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))
        empty = 0 in self.shape
        if self.offset + (0 if empty else reach + 1) > available:
            raise Damaged(
                f"a tensor of shape {self.shape}, strides {self.strides} and offset {self.offset} "
                f"does not lie in its storage of {available} values"
            )
        if empty:
            return Stored.of(np.zeros(self.shape, kind), self.dtype)
        whole = storage.data[: available * kind.itemsize]
        flat = np.frombuffer(whole, np.dtype(f"{self.order}{kind.str[1:]}"))
        same = (self.offset, self.strides, self.order) == (0, row_major(self.shape), "<")
        all_of_it = same and size_of(self.shape) * kind.itemsize == len(storage.data)
        checksum = storage.checksum if all_of_it else None
        return Stored(
            self.dtype, self.shape, _strided(flat, self), verify=storage.verify, checksum=checksum
        )


def row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides, in values, of a tensor in C order."""
    strides = [1]
    for size in shape[:0:-1]:
        strides.append(strides[-1] * size)
    return tuple(strides[: len(shape)][::-1])


def _strided(flat: Array, tensor: Tensor) -> Callable[[], Array]:
    def bits() -> Array:
        steps = tuple(s * flat.itemsize for s in tensor.strides)
        values: Array = np.lib.stride_tricks.as_strided(
            flat[tensor.offset :], tensor.shape, steps, writeable=False
        )
        return values if flat.dtype.isnative else values.astype(flat.dtype.newbyteorder("="))

    return bits


class Session:
    """The storages and tensors of one file while its pickle is read."""

    def __init__(self, size: int, order: str = "<") -> None:
        """A file of ``size`` bytes, whose values have the byte order "<" or ">"."""
        self.storages: dict[str, Storage] = {}
        self._order = order
        self._room = MAX_COPIES * size + SMALL
        self.known = PLAIN | table(
            *(Known(f"torch.{name}") for name in (*STORAGES, "UntypedStorage")),
            *(Known(f"torch.cuda.{name}") for name in STORAGES),
            *(Known(f"torch.{name}") for name in (*TYPES, *SYNONYMS)),
            Known("torch.storage.UntypedStorage"),
            Known("torch.Tensor"),
            Known("torch.nn.parameter.Parameter"),
            Known("torch.Size", _size),
            Known("torch.device", _device),
            Known("torch._utils._rebuild_tensor", self.tensor),
            Known("torch._utils._rebuild_tensor_v2", self.tensor),
            Known("torch._utils._rebuild_tensor_v3", self.typed_tensor),
            Known("torch._utils._rebuild_parameter", _first),
            Known("torch._utils._rebuild_parameter_with_state", _first),
            Known("torch._tensor._rebuild_from_type_v2", _inner),
        )

    def persistent(self, identity: Any) -> Storage:
        """The storage of a persistent id: ("storage", class, key, device, count)."""
        if not isinstance(identity, tuple) or len(identity) < 5 or identity[0] != "storage":
            raise Malformed(f"it holds something else than tensors (a whole module?); {REMEDY}")
        kind, key, _, count = identity[1:5]
        if identity[5:] not in ((), (None,)):
            raise Malformed("a view of a storage, as PyTorch 0.3 saved it: save it anew")
        name = kind.name.rsplit(".", 1)[-1] if isinstance(kind, Known) else ""
        if name not in STORAGES and name != "UntypedStorage":
            raise Damaged(f"a storage of type {name[:60]!r}, which is not supported")
        dtype = STORAGES.get(name, "")
        if not isinstance(key, str) or type(count) is not int or not 0 <= count < 2**60:
            raise Damaged("a storage without name or size")
        storage = self.storages.setdefault(key, Storage(key, dtype, count))
        if (storage.dtype, storage.count) != (dtype, count):
            raise Damaged(f"two storages with the name {key[:40]!r}")
        return storage

    def tensor(self, storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> Tensor:
        """A tensor of the type of its storage."""
        dtype = storage.dtype if isinstance(storage, Storage) else ""
        return self._made(storage, dtype, offset, shape, strides)

    def typed_tensor(self, *arguments: Any) -> Tensor:
        """A tensor that names its type: (storage, offset, shape, strides, ..., dtype, metadata)."""
        named = [a.name.rsplit(".", 1)[-1] for a in arguments[6:8] if isinstance(a, Known)]
        dtype = next((SYNONYMS.get(n, n) for n in named), "")
        return self._made(arguments[0], dtype, *arguments[1:4])

    def _made(self, storage: Any, dtype: str, offset: Any, shape: Any, strides: Any) -> Tensor:
        if not isinstance(storage, Storage) or dtype not in TYPES:
            raise Damaged(f"a tensor of type {dtype[:40]!r}, which is not supported")
        if not isinstance(shape, tuple) or not isinstance(strides, tuple):
            raise Damaged("a tensor without shape or strides")
        small = all(type(n) is int and 0 <= n < 2**60 for n in (offset, *strides))
        if not small or len(strides) != len(shape):
            raise Damaged(
                f"a tensor with offset {str(offset)[:40]} and strides {str(strides)[:100]}"
            )
        self._room -= size_of(shape) * np.dtype(bits_type(dtype)).itemsize
        if self._room < 0:
            raise Damaged(f"a tensor of shape {shape}, far larger than the file")
        return Tensor(storage, dtype, offset, shape, strides, self._order)


def _size(shape: tuple[int, ...] = ()) -> tuple[int, ...]:
    return tuple(shape)


def _device(kind: str, index: int | None = None) -> str:
    return str(kind)[:40] if index is None else f"{str(kind)[:40]}:{int(index)}"


def _first(tensor: Any, *_: Any) -> Any:
    if not isinstance(tensor, Tensor):
        raise Damaged("a parameter that is no tensor")
    return tensor


def _inner(rebuild: Any, _: Any, arguments: Any, __: Any) -> Any:
    """A tensor of a subclass is read as a plain tensor."""
    if not isinstance(rebuild, Known) or "._rebuild_" not in rebuild.name or rebuild.call is None:
        raise Damaged("a tensor of an unknown class")
    if rebuild.call is _inner:
        raise Damaged("a tensor of a class of classes")
    return rebuild.call(*arguments)


def read_zip(data: memoryview) -> Node:
    """The tree of a zip container.

    Raises:
        Malformed: the file is damaged, or uses what is not allowed.
    """
    archive = Archive(data)
    roots = [name[: -len("data.pkl")] for name in archive.members if name.endswith("/data.pkl")]
    if len(roots) != 1:
        what = "a TorchScript program" if len(roots) > 1 else "no data.pkl"
        wanted = "give what torch.save or numpy.savez wrote"
        raise Malformed(f"a zip archive with {what}: no weights; {wanted}")
    root = roots[0]
    if f"{root}constants.pkl" in archive.members:
        raise Malformed("a TorchScript program: save the state_dict of the model instead")
    order = "<"
    if f"{root}byteorder" in archive.members:
        order = ">" if bytes(archive.checked(f"{root}byteorder")) == b"big" else "<"
    session = Session(len(data), order)
    pickle = archive.checked(f"{root}data.pkl")
    found, _ = load(pickle, session.known, persistent=session.persistent)
    for storage in session.storages.values():
        name = f"{root}data/{storage.key}"
        storage.data = archive.read(name)
        storage.check = partial(archive.verify, name, storage.data)
        # An archive without checksums has 0 there.
        storage.checksum = archive.members[name].check or None
        _check_size(storage)
    return settled(found)


def _check_size(storage: Storage) -> None:
    size = storage.count * (np.dtype(bits_type(storage.dtype)).itemsize if storage.dtype else 1)
    if storage.data is None or len(storage.data) != size:
        there = 0 if storage.data is None else len(storage.data)
        raise Malformed(
            f"the storage {storage.key[:40]!r} has {there} bytes, expected {size}: fetch the file "
            "again"
        )


def is_legacy(data: memoryview) -> bool:
    """Whether the bytes begin as a legacy container does."""
    return bytes(data[:2]) == b"\x80\x02" and bytes(data[2:14]) == b"\x8a\x0a" + MAGIC


def read_legacy(data: memoryview) -> Node:
    """The tree of a legacy container: five pickles, then the storages.

    Raises:
        Malformed: the file is damaged, or uses what is not allowed.
    """
    _, position = load(data, {})
    version, position = load(data, {}, start=position)
    system, position = load(data, {}, start=position)
    if version != 1001 or not isinstance(system, dict):
        raise Damaged("a legacy file of PyTorch of another version")
    session = Session(len(data), "<" if system.get("little_endian", True) else ">")
    found, position = load(data, session.known, persistent=session.persistent, start=position)
    keys, position = load(data, {}, start=position)
    if not isinstance(keys, list) or sorted(map(str, keys)) != sorted(session.storages):
        raise Damaged("a legacy file of PyTorch whose list of storages is damaged")
    for key in keys:
        storage = session.storages[key]
        if position + 8 > len(data):
            raise Malformed("cut short inside its tensors: fetch the file again")
        (count,) = struct.unpack_from("<q", data, position)
        if count != storage.count or not storage.dtype:
            raise Damaged(f"the storage {key[:40]!r} has {count} values, not {storage.count}")
        end = position + 8 + count * np.dtype(bits_type(storage.dtype)).itemsize
        if end > len(data):
            raise Malformed("cut short inside its tensors: fetch the file again")
        storage.data = data[position + 8 : end]
        position = end
    return settled(found)
