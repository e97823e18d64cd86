"""The state of one reading of a pickle: its stack, its memo, and the bounds of its objects."""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from triptych.core.files.tree import Damaged, Malformed, Pending

SLACK = 32 * 2**20
"""Bytes that the objects of a pickle may take beyond twice the length of its data."""

COST = 100
"""Bytes that an opcode is taken to need. A call counts for ten."""

LONG_TEXT = 2**20
"""Bytes of a text from which on it must be Latin-1: old protocols store the bytes of arrays so."""

MAX_INTEGER = 4096
"""Bytes of an integer."""

REMEDY = (
    "nothing was run; if you trust the file, open it with its own library and save the state_dict "
    "alone"
)


class Buildable(Protocol):
    """An object that takes its state after it was made."""

    def build(self, state: Any, /) -> None:
        """Takes the state; a malformed one raises ValueError, TypeError or LookupError."""


@dataclass(frozen=True, eq=False)
class Known(Pending):
    """A name that a pickle may use. In a tree it stands as the text of its name.

    Attributes:
        name: full name, e.g. "torch.float16".
        call: makes an object from arguments; None: the name is a mere constant.
    """

    name: str
    call: Callable[..., Any] | None = None

    def finished(self) -> str:
        """See ``core.files.tree.Pending``."""
        return self.name


CUT = "cut short inside its pickle: fetch the file again"
MODULES = {
    "__builtin__": "builtins",
    "copy_reg": "copyreg",
    "numpy._core.multiarray": "numpy.core.multiarray",
    "numpy._core.numeric": "numpy.core.numeric",
}
"""Names of modules that changed -> the name in the tables."""


def key(item: Any) -> Any:
    """A key of a dictionary: one whose hash costs no more than its length.

    Raises:
        Malformed: it is of another kind.
    """
    if isinstance(item, Known):
        return item.name
    if isinstance(item, memoryview) and len(item) <= 1000:
        return bytes(item)
    parts = item if isinstance(item, tuple) and len(item) <= 8 else (item,)
    for part in parts:
        small = part.bit_length() < 64 if isinstance(part, int) else True
        if not (part is None or isinstance(part, str | bytes | int)) or not small:
            raise Damaged(f"a dictionary with a key of type {type(part).__name__}")
    return item


class Machine:
    """The stack, the memo and the position of one reading."""

    def __init__(
        self,
        data: memoryview,
        known: Mapping[str, Known],
        persistent: Callable[[Any], Any] | None,
        text: str,
        start: int,
    ) -> None:
        self.data = data
        self.known = known
        self.persistent = persistent
        self.text = text
        self.position = start
        self.room = 2 * (len(data) - start) + SLACK
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def charge(self, size: int) -> None:
        """Takes ``size`` bytes of the room for objects."""
        self.room -= size
        if self.room < 0:
            raise Damaged(f"more objects than a file of {len(self.data)} bytes may hold")

    def operation(self) -> int:
        """The next byte."""
        if self.position >= len(self.data):
            raise Malformed(CUT)
        self.position += 1
        return self.data[self.position - 1]

    def take(self, size: int) -> memoryview:
        """The next bytes."""
        end = self.position + size
        if end > len(self.data):
            raise Malformed(CUT)
        piece = self.data[self.position : end]
        self.position = end
        return piece

    def number(self, size: int, *, signed: bool = False) -> int:
        """The next bytes as an integer."""
        return int.from_bytes(self.take(size), "little", signed=signed)

    def line(self, limit: int = 1000) -> bytes:
        """The bytes up to the next line end, less than ``limit``."""
        length, window, end = 1000, b"", -1
        while end < 0:
            window = bytes(self.data[self.position : self.position + min(length, limit)])
            end = window.find(b"\n")
            if end < 0 and (len(window) < length or length >= limit):
                raise Damaged("a damaged pickle: a line without an end")
            length *= 8
        self.position += end + 1
        return window[:end]

    def unicode(self, size: int) -> str:
        """The next bytes as text."""
        piece = self.take(size)
        if size > LONG_TEXT and (np.frombuffer(piece, np.uint8) >= 0xC4).any():
            raise Damaged(f"a text of {size} bytes that does not hold the values of an array")
        return self.kept(str(piece, "utf-8", "surrogatepass"))

    def kept(self, text: str) -> str:
        """The text, after its size is charged."""
        self.charge(sys.getsizeof(text))
        return text

    def old_string(self, piece: bytes | memoryview) -> Any:
        """A string of Python 2."""
        if self.text == "bytes":
            return piece
        return self.kept(str(piece, self.text))

    def push(self, item: Any) -> None:
        """Puts an object on the stack."""
        self.stack.append(item)

    def pop(self) -> Any:
        """Takes the uppermost object, which must lie above the last mark."""
        self.above(1)
        return self.stack.pop()

    def top(self) -> Any:
        """The uppermost object."""
        self.above(1)
        return self.stack[-1]

    def above(self, count: int) -> None:
        """Raises Malformed unless ``count`` objects lie above the last mark."""
        if len(self.stack) - (self.marks[-1] if self.marks else 0) < count:
            raise Damaged("a damaged pickle: it takes more objects than it made")

    def since_mark(self) -> list[Any]:
        """Takes the last mark and the objects above it."""
        if not self.marks:
            raise Damaged("a damaged pickle: a mark is missing")
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def recall(self, place: int) -> None:
        """Pushes an object of the memo."""
        if place not in self.memo:
            raise Damaged("a damaged pickle: it recalls what it never made")
        self.push(self.memo[place])

    def name(self, module: str, name: str) -> None:
        """Pushes the constructor of a name."""
        full = f"{MODULES.get(module, module)}.{name}"
        if full not in self.known:
            shown = ascii(f"{module}.{name}"[:200])[1:-1]
            raise Malformed(f"it wants to use {shown}: refused; {REMEDY}")
        self.push(self.known[full])

    def call(self, function: Any, arguments: Any) -> None:
        """Pushes what a constructor makes."""
        if not isinstance(function, Known) or function.call is None:
            shown = function.name if isinstance(function, Known) else type(function).__name__
            raise Malformed(f"it wants to call {shown}, which makes nothing; {REMEDY}")
        if not isinstance(arguments, tuple):
            raise Damaged("a damaged pickle: a call without arguments")
        texts = sum(len(a) for a in arguments if isinstance(a, str | bytes))
        items = sum(len(a) for a in arguments if isinstance(a, list | tuple | dict))
        self.charge(10 * COST + texts + COST * items)
        self.push(function.call(*arguments))

    def fill(self, items: list[Any]) -> None:
        """Puts keys and values, in turn, into the uppermost dictionary."""
        target = self.top()
        if not isinstance(target, dict) or len(items) % 2:
            raise Damaged("a damaged pickle: keys and values without a dictionary")
        target.update(zip(map(key, items[::2]), items[1::2], strict=True))

    def extend(self, items: list[Any]) -> None:
        """Puts items into the uppermost list."""
        target = self.top()
        if not isinstance(target, list):
            raise Damaged("a damaged pickle: items without a list")
        target.extend(items)
