"""Reads what ``paddle.save`` writes, and other pickles of arrays, without Paddle.

Paddle has no uint16, and stores bfloat16 as uint16: such an array is read as bfloat16.
"""

from dataclasses import replace
from typing import Any

import numpy as np

from triptych.core.files.constructors import PLAIN, NumpyArray, size_of, table
from triptych.core.files.machine import Known
from triptych.core.files.pickles import load
from triptych.core.files.tree import Damaged, Node, Pending, Stored, settled

NAMES = "StructuredToParameterName@@"
"""Entry of a flat state: name in the model -> generated name of the parameter."""

PARTS = "UnpackBigParamInfor@@"
"""Entry of a flat state that was written with protocol 2 or 3: what was split into parts."""


class _Named(Pending):
    """A tensor with its generated name: the pair that ``paddle.save`` makes by a call."""

    def __init__(self, name: str, array: NumpyArray) -> None:
        self.name = name
        self.array = array

    def finished(self) -> Stored:
        """See ``core.files.tree.Pending``."""
        return replace(_typed(self.array.finished()), unique=self.name)


class _Array(NumpyArray):
    """An array of a Paddle file."""

    def finished(self) -> Stored:
        """See ``core.files.tree.Pending``."""
        return _typed(super().finished())


def _typed(stored: Stored) -> Stored:
    return replace(stored, dtype="bfloat16") if stored.dtype == "uint16" else stored


def _tuple(items: Any = ()) -> Any:
    if not isinstance(items, list | tuple):
        raise Damaged("a tuple made of no sequence")
    if len(items) == 2 and isinstance(items[0], str) and isinstance(items[1], NumpyArray):
        return _Named(*items)
    return tuple(items)


PADDLE = PLAIN | table(
    Known("builtins.tuple", _tuple),
    Known("numpy.ndarray", _Array),
    Known("numpy.core.multiarray._reconstruct", _Array),
)


def read_pickle(data: memoryview) -> tuple[str, Node]:
    """The container ("paddle" or "pickle") and the tree of a pickle of arrays.

    Raises:
        Malformed: the file is damaged, or uses what is not allowed.
    """
    found, end = load(data, PADDLE)
    if end != len(data):
        raise Damaged(f"{len(data) - end} bytes behind its pickle")
    if _is_detectron(found):
        # bfloat16 is Paddle's convention alone.
        return "pickle", settled(load(data, PLAIN)[0])
    tree = settled(found)
    return "paddle", _joined(tree) if isinstance(tree, dict) else tree


def _is_detectron(found: Any) -> bool:
    """Whether a file has the entries that detectron2 asks for in its pickles."""
    return isinstance(found, dict) and {"model", "__author__"} <= set(found)


def _joined(tree: dict[Any, Node]) -> dict[Any, Node]:
    """A flat state without its bookkeeping: parts are joined, generated names are attached."""
    splits, names = tree.pop(PARTS, {}), tree.pop(NAMES, {})
    if not isinstance(splits, dict) or not isinstance(names, dict):
        raise Damaged(f"its entry {NAMES} or {PARTS} is damaged")
    for name, how in splits.items():
        tree[name] = _join(tree, name, how)
    for name, unique in names.items():
        if isinstance(tree.get(name), Stored) and isinstance(unique, str):
            tree[name] = replace(tree[name], unique=unique)
    return tree


def _join(tree: dict[Any, Node], name: Any, how: Any) -> Stored:
    """One tensor from its parts, which leave the tree; joined when its values are asked for."""
    pieces = how.get("slices") if isinstance(how, dict) else None
    shape = how.get("OriginShape") if isinstance(how, dict) else None
    if not isinstance(pieces, list) or not isinstance(shape, tuple) or not pieces:
        raise Damaged(f"its entry {PARTS} is damaged at {str(name)[:100]!r}")
    parts = [tree.pop(piece, None) for piece in pieces]
    stored = [part for part in parts if isinstance(part, Stored)]
    whole = len(stored) == len(parts) and len({part.dtype for part in stored}) == 1
    if not whole or sum(size_of(part.shape) for part in stored) != size_of(shape):
        raise Damaged(f"the parts of {str(name)[:100]!r} do not make its shape {shape}")

    def bits() -> Any:
        return np.concatenate([part.bits().reshape(-1) for part in stored]).reshape(shape)

    return Stored(stored[0].dtype, shape, bits)
