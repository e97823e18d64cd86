"""Writes pickles of plain containers and tensors, without the framework that will load them.

Only what the readers of all frameworks allow is written: dictionaries, lists, tuples, texts, bytes,
numbers, None, and tensors in the form that the caller chooses.
"""

import struct
from collections.abc import Callable, Sequence
from typing import IO, Any, Protocol

import numpy as np

from triptych.core.contracts import Array
from triptych.core.errors import UserError
from triptych.core.files.tree import Node, Stored

CODES = {"float16": "f2", "float32": "f4", "float64": "f8", "bfloat16": "u2", "bool": "b1"} | {
    name: np.dtype(name).str[1:]
    for name in ("int8", "int16", "int32", "int64", "uint8", "complex64", "complex128")
}
"""Type of a tensor -> NumPy's code of the array that holds it."""


class Emitter:
    """A pickle while it is written.

    Args:
        stream: gets the bytes.
        tensor: writes the operations that make a tensor.
        protocol: of the pickle, 2 or 4. Protocol 2 has no byte strings and writes them as a call.
        binary: whether the tree may hold byte strings, which ``paddle.load`` refuses.
    """

    def __init__(
        self,
        stream: IO[bytes],
        tensor: Callable[["Emitter", Stored], None],
        protocol: int,
        *,
        binary: bool = True,
    ) -> None:
        """A pickle whose first bytes are written."""
        self.stream = stream
        self._tensor = tensor
        self._protocol = protocol
        self._binary = binary
        self.raw(b"\x80" + bytes([protocol]))

    def raw(self, operations: bytes) -> None:
        """Writes operations."""
        self.stream.write(operations)

    def name(self, module: str, name: str) -> None:
        """Pushes what a name stands for."""
        self.raw(f"c{module}\n{name}\n".encode())

    def values(self, array: Array) -> None:
        """Pushes the values of an array as a byte string, which only protocol 4 has."""
        self.raw(b"\x8e" + struct.pack("<Q", array.nbytes))
        stream_values(self.stream, array)

    def node(self, node: Node, where: str = "") -> None:
        """Pushes a part of a tree.

        Raises:
            UserError: it holds an object that no file can hold; names its place.
        """
        if isinstance(node, Stored):
            self._tensor(self, node)
        elif isinstance(node, dict):
            self.raw(b"}(")
            for key, value in node.items():
                self.node(key, f"{where} key")
                self.node(value, f"{where}|{key}")
            self.raw(b"u")
        elif isinstance(node, list | tuple):
            self.raw(b"](" if isinstance(node, list) else b"(")
            for index, value in enumerate(node):
                self.node(value, f"{where}|{index}")
            self.raw(b"e" if isinstance(node, list) else b"t")
        else:
            self._leaf(node, where)

    def _leaf(self, node: Any, where: str) -> None:
        if node is None or isinstance(node, bool):
            self.raw({None: b"N", True: b"\x88", False: b"\x89"}[node])
        elif isinstance(node, int) and node.bit_length() < 2000:
            size = node.bit_length() // 8 + 1
            self.raw(b"\x8a" + bytes([size]) + node.to_bytes(size, "little", signed=True))
        elif isinstance(node, float):
            self.raw(b"G" + struct.pack(">d", node))
        elif isinstance(node, str):
            raw = node.encode("utf-8", "surrogatepass")
            self.raw(b"X" + struct.pack("<I", len(raw)) + raw)
        elif isinstance(node, bytes) and self._binary and self._protocol >= 3:
            self.raw(b"B" + struct.pack("<I", len(node)) + node)
        elif isinstance(node, bytes) and self._binary:
            self.name("_codecs", "encode")
            self.node((node.decode("latin1"), "latin1"))
            self.raw(b"R")
        else:
            place = where.strip("|") or "the top level"
            raise UserError(f"{place}: an object of type {type(node).__name__} cannot be written")

    def ints(self, values: Sequence[int]) -> None:
        """Pushes a tuple of integers."""
        self.node(tuple(int(value) for value in values))

    def array(self, stored: Stored) -> None:
        """Pushes a tensor as a NumPy array, under names that every version of NumPy knows."""
        code = CODES.get(stored.dtype)
        if code is None:
            raise UserError(f"tensors of type {stored.dtype} cannot be written")
        self.name("numpy.core.multiarray", "_reconstruct")
        self.name("numpy", "ndarray")
        self.ints([0])
        self.raw(b"C\x01b\x87R(")
        self.node(1)
        self.ints(stored.shape)
        self.name("numpy", "dtype")
        self.node((code, False, True))
        self.raw(b"R")
        self.node((3, "<" if np.dtype(code).itemsize > 1 else "|", None, None, None, -1, -1, 0))
        self.raw(b"b\x89")
        self.values(stored.bits())
        self.raw(b"tb")

    def stop(self) -> None:
        """Ends the pickle."""
        self.raw(b".")


class Writable(Protocol):
    """What takes bytes."""

    def write(self, data: Any, /) -> int:
        """Writes all of ``data``."""


def stream_values(stream: Writable, array: Array) -> None:
    """Writes the values in C order and little-endian."""
    little = np.ascontiguousarray(array.astype(array.dtype.newbyteorder("<"), copy=False))
    # A bool or an empty array has no plain view of its memory; its bytes have.
    stream.write(little.reshape(-1).view(np.uint8).data)
