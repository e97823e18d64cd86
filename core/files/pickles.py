"""Reads pickles without running anything that they name.

The machine here interprets the bytes itself. What a pickle may call is a closed table of our own
constructors, so no name in a file ever leads to a function of Python or of a framework. Time and
memory are bounded by the length of the data, and byte strings are views of the data, not copies.

Protocols 0 to 4 are read, and of protocol 5 what is stored in one piece.
"""

from collections.abc import Callable, Mapping
from typing import Any

from triptych.core.files.machine import COST, REMEDY, Known, Machine
from triptych.core.files.opcodes import STEPS
from triptych.core.files.tree import Damaged, Malformed


def load(
    data: memoryview,
    known: Mapping[str, Known],
    *,
    persistent: Callable[[Any], Any] | None = None,
    text: str = "latin1",
    start: int = 0,
) -> tuple[Any, int]:
    """The object of a pickle, with pending objects in it, and the position behind the pickle.

    Args:
        data: the bytes; objects keep views of them.
        known: full name -> what a pickle may use.
        persistent: makes an object of a persistent id.
        text: how the strings of Python 2 are decoded; "bytes": not at all.
        start: where the pickle begins.

    Raises:
        Malformed: the pickle is damaged, too large, or names something that is not in ``known``.
    """
    machine = Machine(data, known, persistent, text, start)
    try:
        return _run(machine), machine.position
    except Malformed:
        raise
    except (TypeError, ValueError, LookupError, AttributeError, OverflowError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise Damaged(f"a damaged pickle (byte {machine.position}): {reason[:200]}") from error


def _run(machine: Machine) -> Any:
    """The object at the first STOP."""
    while (code := machine.operation()) != ord("."):
        step = STEPS.get(code)
        if step is None:
            raise Malformed(f"a pickle with the operation {bytes([code])!r}: refused; {REMEDY}")
        machine.charge(COST)
        step(machine)
    result = machine.pop()
    if machine.stack or machine.marks:
        raise Damaged("a damaged pickle: more than one object")
    return result
