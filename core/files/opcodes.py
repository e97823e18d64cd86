"""What each operation of a pickle does to the machine. Operations that are not here are refused."""

import codecs
import struct
from collections.abc import Callable
from typing import Any

from triptych.core.files.machine import COST, LONG_TEXT, MAX_INTEGER, Machine
from triptych.core.files.tree import Damaged, Malformed, Record

Step = Callable[[Machine], None]
STEPS: dict[int, Step] = {}
"""Opcode -> what it does."""


def _opcode(code: bytes) -> Callable[[Step], Step]:
    def register(step: Step) -> Step:
        STEPS[code[0]] = step
        return step

    return register


def _constant(value: Any) -> Step:
    return lambda m: m.push(value)


def _integer(size: int, *, signed: bool = False) -> Step:
    return lambda m: m.push(m.number(size, signed=signed))


def _counted(size: int, push: Callable[[Machine, int], None]) -> Step:
    """An operation on as many bytes, or on the number, that ``size`` bytes give."""
    return lambda m: push(m, m.number(size))


def _empty(make: Callable[[], Any]) -> Step:
    return lambda m: m.push(make())


def _gathered(make: Callable[[list[Any]], Any]) -> Step:
    return lambda m: m.push(make(m.since_mark()))


def _tuple_of(count: int) -> Step:
    return lambda m: _tuple(m, count)


def _bytes(m: Machine, size: int) -> None:
    m.push(m.take(size))


def _text(m: Machine, size: int) -> None:
    m.push(m.unicode(size))


def _old_string(m: Machine, size: int) -> None:
    m.push(m.old_string(m.take(size)))


def _remember(m: Machine, place: int) -> None:
    m.memo[place] = m.top()


def _extend(m: Machine) -> None:
    m.extend(m.since_mark())


def _tuple(m: Machine, count: int) -> None:
    m.above(count)
    items = tuple(m.stack[-count:])
    del m.stack[-count:]
    m.push(items)


def _long(m: Machine, size: int) -> None:
    if size > MAX_INTEGER:
        raise Damaged(f"an integer of {size} bytes")
    m.push(m.number(size, signed=True))


_ALIKE: dict[bytes, Step] = {
    b"N": _constant(None),
    b"\x88": _constant(True),
    b"\x89": _constant(False),
    b"K": _integer(1),
    b"M": _integer(2),
    b"J": _integer(4, signed=True),
    b"\x8a": _counted(1, _long),
    b"\x8b": _counted(4, _long),
    b"C": _counted(1, _bytes),
    b"B": _counted(4, _bytes),
    b"\x8e": _counted(8, _bytes),
    b"\x96": _counted(8, _bytes),
    b"\x8c": _counted(1, _text),
    b"X": _counted(4, _text),
    b"\x8d": _counted(8, _text),
    b"U": _counted(1, _old_string),
    b"T": _counted(4, _old_string),
    b"h": _counted(1, Machine.recall),
    b"j": _counted(4, Machine.recall),
    b"q": _counted(1, _remember),
    b"r": _counted(4, _remember),
    b")": _empty(tuple),
    b"]": _empty(list),
    b"}": _empty(dict),
    b"\x8f": _empty(list),
    b"t": _gathered(tuple),
    b"l": _gathered(list),
    b"\x91": _gathered(list),
    b"\x85": _tuple_of(1),
    b"\x86": _tuple_of(2),
    b"\x87": _tuple_of(3),
    b"e": _extend,
    b"\x90": _extend,
}
"""Operations that differ only in a number, a constant or a type."""

STEPS.update({code[0]: step for code, step in _ALIKE.items()})


@_opcode(b"\x80")
def _protocol(m: Machine) -> None:
    number = m.number(1)
    if number > 5:
        raise Malformed(f"a pickle of protocol {number}; 0 to 5 are known")


@_opcode(b"\x95")
def _frame(m: Machine) -> None:
    # A frame only helps a reader of a stream.
    m.number(8)


@_opcode(b"(")
def _mark(m: Machine) -> None:
    m.marks.append(len(m.stack))


@_opcode(b"0")
def _pop(m: Machine) -> None:
    m.pop()


@_opcode(b"1")
def _pop_mark(m: Machine) -> None:
    m.since_mark()


@_opcode(b"2")
def _duplicate(m: Machine) -> None:
    m.push(m.top())


@_opcode(b"\x94")
def _memoize(m: Machine) -> None:
    m.memo[len(m.memo)] = m.top()


@_opcode(b"p")
def _put(m: Machine) -> None:
    m.memo[int(m.line())] = m.top()


@_opcode(b"g")
def _get(m: Machine) -> None:
    m.recall(int(m.line()))


@_opcode(b"G")
def _float(m: Machine) -> None:
    m.push(struct.unpack(">d", m.take(8))[0])


@_opcode(b"F")
def _float_line(m: Machine) -> None:
    m.push(float(m.line()))


@_opcode(b"I")
def _int_line(m: Machine) -> None:
    line = m.line()
    m.push(line == b"01" if line in (b"00", b"01") else int(line))


@_opcode(b"L")
def _long_line(m: Machine) -> None:
    m.push(int(m.line().removesuffix(b"L")))


@_opcode(b"S")
def _string_line(m: Machine) -> None:
    line = m.line(len(m.data))
    if len(line) < 2 or line[0] != line[-1] or line[:1] not in (b"'", b'"'):
        raise Damaged("a damaged pickle: a string without quotes")
    m.push(m.old_string(memoryview(codecs.escape_decode(line[1:-1])[0])))


@_opcode(b"V")
def _unicode_line(m: Machine) -> None:
    m.push(m.kept(str(m.line(LONG_TEXT), "raw-unicode-escape")))


@_opcode(b"d")
def _dict(m: Machine) -> None:
    items = m.since_mark()
    m.push({})
    m.fill(items)


@_opcode(b"s")
def _set_item(m: Machine) -> None:
    value, name = m.pop(), m.pop()
    m.fill([name, value])


@_opcode(b"u")
def _set_items(m: Machine) -> None:
    m.fill(m.since_mark())


@_opcode(b"a")
def _append(m: Machine) -> None:
    item = m.pop()
    m.extend([item])


@_opcode(b"c")
def _global(m: Machine) -> None:
    module = m.line().decode()
    m.name(module, m.line().decode())


@_opcode(b"\x93")
def _stack_global(m: Machine) -> None:
    name, module = m.pop(), m.pop()
    if not isinstance(name, str) or not isinstance(module, str):
        raise Damaged("a damaged pickle: a name that is no text")
    m.name(module, name)


@_opcode(b"R")
def _reduce(m: Machine) -> None:
    arguments, function = m.pop(), m.pop()
    m.call(function, arguments)


@_opcode(b"\x81")
def _new(m: Machine) -> None:
    _reduce(m)


@_opcode(b"Q")
def _persistent(m: Machine) -> None:
    if m.persistent is None:
        raise Damaged("a pickle that refers to data outside of it")
    m.charge(10 * COST)
    m.push(m.persistent(m.pop()))


@_opcode(b"b")
def _build(m: Machine) -> None:
    state, target = m.pop(), m.top()
    if isinstance(state, list | tuple | dict):
        m.charge(COST * len(state))
    if isinstance(target, Record):
        # (None, attributes) or (attributes, slots): how copyreg writes a class with slots.
        if not isinstance(state, dict):
            raise Damaged(f"{target.kind} with a state that is no dictionary")
        target.update(state)
    elif isinstance(target, dict):
        # Attributes of an OrderedDict, such as torch's _metadata: no weights.
        pass
    elif hasattr(target, "build"):
        target.build(state)
    else:
        raise Damaged(f"a damaged pickle: a state for {type(target).__name__}")
