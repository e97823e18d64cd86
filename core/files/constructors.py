"""What a pickle may call: plain containers, NumPy's arrays, and inert records of known classes."""

import math
import re
from collections.abc import Iterable
from typing import Any

import numpy as np

from triptych.core.contracts import Array
from triptych.core.files.machine import REMEDY, Known, key
from triptych.core.files.tree import Damaged, Malformed, Pending, Record, Stored

HISTORY = "mmengine.logging.history_buffer.HistoryBuffer"
"""mmengine's record of logged numbers. Its pickle asks for methods of this class by ``getattr``."""

RECORDS = (
    "argparse.Namespace",
    "types.SimpleNamespace",
    HISTORY,
    "pytorch_lightning.utilities.parsing.AttributeDict",
    "lightning_fabric.utilities.data.AttributeDict",
)
"""Classes whose attributes are kept, as a ``Record``."""

VALUES = (
    "datetime.datetime",
    "datetime.date",
    "datetime.time",
    "datetime.timedelta",
    "datetime.timezone",
    "uuid.UUID",
)
"""Classes of which only the arguments are kept, as a ``Record`` with the key "arguments"."""

PATHS = ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath", "Path", "PurePath")

MAX_DIMENSIONS = 32
"""NumPy's limit of the dimensions of an array, before NumPy 2."""


def size_of(shape: tuple[Any, ...]) -> int:
    """The number of values of a shape.

    Raises:
        Malformed: it is no shape.
    """
    whole = all(type(n) is int and 0 <= n < 2**63 for n in shape)
    if not whole or len(shape) > MAX_DIMENSIONS:
        raise Damaged(f"a tensor with the shape {str(shape)[:100]}")
    return math.prod(shape)


TYPE = re.compile(r"[<>|=]?(b1|[iu][1248]|f[248]|c8|c16|[US]\d{1,4})")
"""Codes of NumPy's types of numbers and texts."""


def _text(value: Any) -> str:
    """A string of Python 2 or 3; "" for anything else."""
    if isinstance(value, bytes | memoryview):
        return bytes(value[:100]).decode("latin1")
    return value[:100] if isinstance(value, str) else ""


class NumpyType(Pending):
    """Stands for ``numpy.dtype``: numbers and texts only, no objects and no fields."""

    def __init__(self, code: Any = "", align: Any = False, copy: Any = False) -> None:
        """A type by its code, e.g. "f4"."""
        code = _text(code)
        if not TYPE.fullmatch(code):
            raise Damaged(f"an array of type {code[:60]!r}: refused")
        self.dtype = np.dtype(code)

    def build(self, state: Any) -> None:
        """Takes the byte order."""
        if isinstance(state, tuple) and len(state) > 1 and _text(state[1]) in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(">" if _text(state[1]) == ">" else "<")

    def finished(self) -> str:
        """See ``core.files.tree.Pending``."""
        return self.dtype.name


class NumpyArray(Pending):
    """Stands for ``numpy.ndarray``. The values stay where they lie in the file."""

    values: Array | None = None

    def __init__(self, *_: Any) -> None:
        """Ignores the arguments, which are placeholders: ``build`` gets the content."""

    def build(self, state: Any) -> None:
        """Takes (version, shape, type, whether by columns, bytes)."""
        _, shape, dtype, by_columns, data = state
        self.values = array_of(data, dtype, shape, by_columns=bool(by_columns))

    def finished(self) -> Stored:
        """See ``core.files.tree.Pending``."""
        if self.values is None:
            raise Damaged("an array without values")
        return Stored.of(self.values)


def array_of(data: Any, dtype: Any, shape: Any, *, by_columns: bool = False) -> Array:
    """The array whose bytes are given.

    Raises:
        Malformed: the bytes do not fill the shape.
    """
    if not isinstance(dtype, NumpyType) or not isinstance(shape, tuple):
        raise Damaged("an array without type or shape, or one of objects: refused")
    if isinstance(data, str):
        # The pickle of Python 2.
        data = data.encode("latin1")
    if not isinstance(data, bytes | memoryview):
        raise Damaged("an array of objects: refused")
    if size_of(shape) * dtype.dtype.itemsize != len(data):
        raise Damaged(f"{len(data)} bytes for {dtype.dtype} of shape {shape}")
    if not len(data):
        return np.zeros(shape, dtype.dtype.newbyteorder("="))
    values = np.frombuffer(data, dtype.dtype).reshape(shape, order="F" if by_columns else "C")
    return values if values.dtype.isnative else values.astype(values.dtype.newbyteorder("="))


def _from_buffer(data: Any, dtype: Any, shape: Any, order: Any) -> NumpyArray:
    made = NumpyArray()
    made.values = array_of(data, dtype, shape, by_columns=order == "F")
    return made


def _scalar(dtype: Any, data: Any = b"") -> Any:
    return array_of(data, dtype, ())[()].item()


def _encode(text: str, encoding: str = "utf-8") -> bytes:
    if encoding not in ("latin1", "latin-1"):
        raise Damaged(f"text in the encoding {str(encoding)[:40]!r}")
    return text.encode("latin1")


def _dictionary(*arguments: Any) -> dict[Any, Any]:
    """OrderedDict(pairs), Counter(dict), defaultdict(factory), dict()."""
    pairs = arguments[-1] if arguments else ()
    if isinstance(pairs, dict):
        return dict(pairs)
    return {} if isinstance(pairs, Known) or pairs is None else _pairs(pairs)


def _pairs(pairs: Iterable[Any]) -> dict[Any, Any]:
    return {key(name): value for name, value in pairs}


def _sequence(items: Any = ()) -> list[Any]:
    return list(_items(items))


def _tuple(items: Any = ()) -> tuple[Any, ...]:
    return tuple(_items(items))


def _items(items: Any) -> list[Any] | tuple[Any, ...]:
    if not isinstance(items, list | tuple):
        raise Damaged("a sequence made of no sequence")
    return items


def _bytes(data: Any = b"", encoding: Any = "latin1") -> bytes:
    if isinstance(data, str):
        return _encode(data, encoding)
    if not isinstance(data, bytes | memoryview):
        raise Damaged("bytes made of no bytes")
    return bytes(data)


def _complex(real: float, imaginary: float) -> complex:
    return complex(float(real), float(imaginary))


def _method(owner: Any, name: Any) -> str:
    """The name of a method of mmengine's history: the one ``getattr`` that is known."""
    known = isinstance(owner, Known) and owner.name == HISTORY
    if not known or not isinstance(name, str) or not re.fullmatch(r"[a-z]\w{0,99}", name):
        shown = f"{getattr(owner, 'name', type(owner).__name__)}, {str(name)[:40]!r}"
        raise Malformed(f"it wants to call getattr({shown}): refused; {REMEDY}")
    return f"{HISTORY}.{name}"


def _record(name: str) -> Known:
    return Known(name, lambda *arguments: Record(name))


def _value(name: str) -> Known:
    return Known(name, lambda *arguments: Record(name, {"arguments": arguments}))


def _path(*parts: Any) -> str:
    return "/".join(part for part in parts if isinstance(part, str)).replace("//", "/")


def _reconstructed(kind: Any, base: Any = None, state: Any = None) -> Any:
    """``copyreg._reconstructor``: how protocols 0 and 1 make an object of a class."""
    if not isinstance(kind, Known) or kind.name not in RECORDS:
        raise Damaged("an object of no known class")
    return Record(kind.name)


def table(*entries: Known) -> dict[str, Known]:
    """Full name -> entry."""
    return {entry.name: entry for entry in entries}


NUMPY = table(
    Known("numpy.ndarray", NumpyArray),
    Known("numpy.dtype", NumpyType),
    Known("numpy.core.multiarray._reconstruct", NumpyArray),
    Known("numpy.core.multiarray.scalar", _scalar),
    Known("numpy.core.numeric._frombuffer", _from_buffer),
    Known("_codecs.encode", _encode),
)
"""Arrays, and how old protocols store bytes."""

PLAIN = NUMPY | table(
    *(
        Known(name, _dictionary)
        for name in (
            "collections.OrderedDict",
            "collections.defaultdict",
            "collections.Counter",
            "builtins.dict",
        )
    ),
    *(Known(f"builtins.{name}", _sequence) for name in ("set", "frozenset", "list")),
    *(Known(f"builtins.{name}", _bytes) for name in ("bytes", "bytearray")),
    *(Known(f"builtins.{name}") for name in ("object", "int", "float", "bool", "str")),
    *(_record(name) for name in RECORDS),
    *(_value(name) for name in VALUES),
    *(Known(f"pathlib.{name}", _path) for name in PATHS),
    Known("builtins.tuple", _tuple),
    Known("builtins.complex", _complex),
    Known("builtins.getattr", _method),
    Known("copyreg._reconstructor", _reconstructed),
)
"""What files of every kind may use."""
