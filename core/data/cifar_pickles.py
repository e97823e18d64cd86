"""Reads the pickles of the python versions of CIFAR-10 and CIFAR-100.

The reader is ``core.files.pickles`` with a short table: it knows only arrays, strings, numbers and
containers, so that no file can run code.
"""

from typing import IO, Any

from triptych.core.files.constructors import NUMPY
from triptych.core.files.pickles import load
from triptych.core.files.tree import Stored, settled


def unpickled(file: IO[bytes]) -> dict[Any, Any]:
    """The dictionary of a file; its strings are bytes, and its arrays are uint8.

    Raises:
        ValueError: the file is malformed, names anything but arrays, or holds no dictionary, or an
            array of another type.
    """
    content = settled(load(memoryview(file.read()), NUMPY, text="bytes")[0])
    if not isinstance(content, dict):
        raise ValueError("no dictionary in it")
    return {name: _plain(value) for name, value in content.items()}


def _plain(value: Any) -> Any:
    if not isinstance(value, Stored):
        return value
    if value.dtype != "uint8":
        raise ValueError(f"an array of type {value.dtype} is refused")
    return value.bits()
