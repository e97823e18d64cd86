"""What a file of weights holds: a tree of dictionaries, lists, scalars and tensors.

``core.files.reading.read`` gives a ``Content``; ``core.files.saving.write`` takes its ``tree``.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from triptych.core.contracts import Array

Node = Any
"""A dictionary, list or tuple of nodes, a ``Record``, a ``Stored``, a string, bytes, an integer, a
float, a complex number, a bool or None. Sets of a file are lists here."""

SEPARATOR = "|"
"""Stands between the keys of nested dictionaries in the names of ``Content.tensors``."""

MAX_DEPTH = 64
"""Levels of containers; a training checkpoint has fewer than 12."""

MAX_NODES = 4_000_000
"""Entries of a tree, counted once for each place where they stand."""

AGAIN = "fetch it again, or save its tensors anew"
"""Remedy of a file that is damaged."""


class Malformed(ValueError):
    """What a file states is false or forbidden. The message ends in the remedy, if there is one."""


class Damaged(Malformed):
    """What a file states is false, and only another copy of the file can help."""

    def __init__(self, reason: str) -> None:
        """The remedy is added to the reason."""
        super().__init__(f"{reason}; {AGAIN}")


def unchecked() -> None:
    """Nothing is known that the bytes of a tensor could be compared with."""


@dataclass(frozen=True, eq=False)
class Stored:
    """A tensor as a file holds it.

    Attributes:
        dtype: NumPy's name of the type, or "bfloat16".
        shape: of the tensor.
        bits: gives the values, bfloat16 as its bit patterns in uint16. They may lie in the mapped
            file: read-only, not contiguous, not aligned.
        unique: name that Paddle generated for a parameter, if the file links it to this tensor.
        verify: compares the bytes with the checksum that the file has of them, if it has one, and
            raises Malformed if they differ. It reads all of them.
        checksum: CRC-32 that the file states of ``bits`` in C order and little-endian, if it does.
    """

    dtype: str
    shape: tuple[int, ...]
    bits: Callable[[], Array]
    unique: str = ""
    verify: Callable[[], None] = unchecked
    checksum: int | None = None

    @classmethod
    def of(cls, values: Array, dtype: str = "", unique: str = "") -> "Stored":
        """A tensor in memory; ``dtype`` is needed for bfloat16, whose values are bit patterns."""
        kind = values.dtype
        # NumPy's name of a type of texts is no type that NumPy knows.
        name = dtype or (kind.str if kind.kind in "US" else kind.name)
        return cls(name, values.shape, lambda: values, unique)

    @property
    def itemsize(self) -> int:
        """Bytes of a value."""
        return np.dtype(bits_type(self.dtype)).itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of all values."""
        return int(np.prod(self.shape, dtype=object)) * self.itemsize

    def array(self) -> Array:
        """The values; bfloat16 is widened to float32, which is exact."""
        bits = self.bits()
        if self.dtype != "bfloat16":
            return bits
        return (bits.astype(np.uint32) << 16).view(np.float32)

    def changed(self, shape: tuple[int, ...], change: Callable[[Array], Array]) -> "Stored":
        """The tensor after a rearrangement of its values, made when the values are asked for."""
        return replace(self, shape=shape, bits=lambda: change(self.bits()), checksum=None)


def bits_type(dtype: str) -> str:
    """The NumPy type of ``Stored.bits``."""
    return "uint16" if dtype == "bfloat16" else dtype


class Record(dict[str, Node]):
    """The attributes of an object that was no plain container, e.g. an ``argparse.Namespace``.

    Attributes:
        kind: the full name of its class, which is never imported.
    """

    def __init__(self, kind: str, attributes: dict[str, Node] | None = None) -> None:
        """An object with these attributes."""
        super().__init__(attributes or {})
        self.kind = kind


@dataclass(frozen=True)
class Content:
    """All that a file, or a folder of files, holds.

    Attributes:
        path: as it was given.
        container: "torch zip", "torch legacy", "paddle", "pickle", "oneflow", "libai",
            "safetensors", "npz" or "folder".
        tree: the top level is kept, e.g. {"epoch": 3, "state_dict": {...}, "optimizer": {...}}.
    """

    path: Path
    container: str
    tree: Node

    def tensors(self) -> dict[str, Stored]:
        """All tensors; the keys on the way are joined by ``SEPARATOR``."""
        return dict(tensors(self.tree))


def tensors(node: Node, prefix: str = "") -> Iterator[tuple[str, Stored]]:
    """Name and tensor of each tensor below a node."""
    if isinstance(node, Stored):
        yield prefix, node
        return
    named = isinstance(node, dict)
    items = node if named or isinstance(node, list | tuple) else ()
    for key, value in node.items() if named else enumerate(items):
        yield from tensors(value, f"{prefix}{SEPARATOR}{key}" if prefix else str(key))


class Pending:
    """An object of a pickle that is not in its final form before the whole file is read."""

    def finished(self) -> Node:
        """The final form, which is no container."""
        raise NotImplementedError


def settled(root: Node) -> Node:
    """The tree with the final form of each pending object. Shared containers stay shared.

    Raises:
        Malformed: the tree is circular, too deep, or has too many entries.
    """
    done: dict[int, tuple[Node, int]] = {}

    def visit(node: Node, depth: int) -> tuple[Node, int]:
        if isinstance(node, memoryview) and id(node) not in done:
            done[id(node)] = bytes(node), 1
        if isinstance(node, Pending) and id(node) not in done:
            done[id(node)] = node.finished(), 1
        if not isinstance(node, dict | list | tuple):
            return done.get(id(node), (node, 1))
        if depth == MAX_DEPTH:
            raise Damaged(f"nested deeper than {MAX_DEPTH} levels, or inside itself")
        if id(node) not in done:
            values = node.values() if isinstance(node, dict) else node
            parts = [visit(value, depth + 1) for value in values]
            size = 1 + sum(count for _, count in parts)
            if size > MAX_NODES:
                raise Damaged(f"more than {MAX_NODES} entries, by repetition of the same ones")
            done[id(node)] = _rebuilt(node, [new for new, _ in parts]), size
        return done[id(node)]

    return visit(root, 0)[0]


def _rebuilt(node: Node, values: list[Node]) -> Node:
    if isinstance(node, Record):
        return Record(node.kind, dict(zip(node, values, strict=True)))
    if isinstance(node, dict):
        return dict(zip(node, values, strict=True))
    return values if isinstance(node, list) else tuple(values)
