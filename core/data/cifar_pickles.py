"""Reads the pickles of the python versions of CIFAR-10 and CIFAR-100.

The unpickler here knows only byte arrays, strings, numbers and containers, so that no file can run
code.
"""

import pickle
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray


def unpickled(file: IO[bytes]) -> dict[Any, Any]:
    """The dictionary of a file; its strings are bytes, and its arrays are uint8.

    Raises:
        ValueError: no dictionary is in the file.
        pickle.UnpicklingError: the file holds anything but byte arrays and plain containers. Other
            malformed files raise what the ``pickle`` module raises.
    """
    content = _Unpickler(file, encoding="bytes").load()
    if not isinstance(content, dict):
        raise ValueError("no dictionary in it")
    return {
        name: value.rows if isinstance(value, _Bytes) else value for name, value in content.items()
    }


class _Bytes:
    """Stands in for a NumPy array of bytes, the only kind of array in these files."""

    rows: NDArray[np.uint8]

    def __init__(self, *_: Any) -> None:
        """Ignores the arguments, which are placeholders: ``__setstate__`` gets the content."""

    def __setstate__(self, state: tuple[Any, tuple[int, ...], "_Dtype", bool, bytes]) -> None:
        _, shape, dtype, by_columns, data = state
        if not isinstance(dtype, _Dtype):
            raise pickle.UnpicklingError("an array without a type is refused")
        self.rows = np.frombuffer(data, np.uint8).reshape(shape, order="F" if by_columns else "C")


class _Dtype:
    """Stands in for ``numpy.dtype``; refuses all types but bytes."""

    def __init__(self, code: Any, *_: Any) -> None:
        if code not in (b"u1", "u1"):
            raise pickle.UnpicklingError(f"an array of type {code!r} is refused")

    def __setstate__(self, state: Any) -> None:
        """Ignores byte order and field names, which bytes do not have."""


def _latin1(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"encoding {encoding!r} is refused")
    return text.encode("latin1")


_KNOWN = {
    ("numpy", "ndarray"): _Bytes,
    ("numpy", "dtype"): _Dtype,
    ("numpy.core.multiarray", "_reconstruct"): _Bytes,
    ("numpy._core.multiarray", "_reconstruct"): _Bytes,
    ("_codecs", "encode"): _latin1,  # Python 3 writes bytes so in an old protocol
}


class _Unpickler(pickle.Unpickler):
    """Builds byte arrays and plain containers; any other name in the file is refused."""

    def find_class(self, module: str, name: str) -> Any:
        """Called for each name that the file imports."""
        try:
            return _KNOWN[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it wants to run {module}.{name}: refused") from None
