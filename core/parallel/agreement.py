"""How processes agree: on the end of their common work if one of them fails, and on their input."""

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

import triptych.core
from triptych.core.config.spec import RunSpec
from triptych.core.contracts import Ranks
from triptych.core.errors import NonFiniteError, Stopped, UserError
from triptych.core.machine.launchers import PADDLE, launched

ERRORS = (UserError, NonFiniteError, Stopped, MemoryError, OSError)
"""The errors that one process may meet and the others not."""
KINDS = (UserError, NonFiniteError, Stopped)
"""What the other processes raise then."""
HASHES = 2**60
SHORT = 40
"""Most characters of a value that a message shows."""
WORD = 7
"""Bytes of a text that ranks exchange at once."""


@contextmanager
def together(ranks: Ranks) -> Iterator[None]:
    """If the block fails on one rank, it raises on all ranks, so that no rank waits for ever.

    All ranks run the same blocks in the same order. Inside, no rank may wait for another.

    Raises:
        UserError, NonFiniteError, Stopped, MemoryError, OSError: on the first rank that failed, its
            error. On the other ranks an error without text: one of ``KINDS``.
    """
    error: Exception | None = None
    try:
        yield
    except ERRORS as caught:
        error = caught
    _report(ranks, error, ranks.largest(_claim(ranks, error)))


@contextmanager
def whole(ranks: Ranks) -> Iterator[None]:
    """As ``together``, for work in which ranks wait for each other inside blocks of ``part``.

    A rank that fails between two parts is here while the others are at the end of a part. All of
    them learn of it, and meet here.
    """
    error: Exception | None = None
    try:
        yield
    except ERRORS as caught:
        error = caught
    claim = ranks.largest(_claim(ranks, error))
    while ranks.any(False):  # True: some are at the end of a part
        claim = ranks.largest(_claim(ranks, error))
    _report(ranks, error, claim)


@contextmanager
def part(ranks: Ranks) -> Iterator[None]:
    """As ``together``, inside a block of ``whole``. After the block ranks may exchange tensors."""
    error: Exception | None = None
    try:
        yield
    except ERRORS as caught:
        error = caught
    claim = ranks.largest(_claim(ranks, error))
    ranks.any(True)
    _report(ranks, error, claim)


def _claim(ranks: Ranks, error: Exception | None) -> int:
    """A number from 1 that is the largest on the rank whose error counts; 0 for no error.

    An error with a text counts more than one without, which may only repeat another rank's.
    """
    if error is None:
        return 0
    kind = next((i for i, k in enumerate(KINDS) if i and isinstance(error, k)), 0)
    said = bool(str(error)) * (ranks.world + 1)
    return (said + ranks.world - ranks.rank) * len(KINDS) + kind


def _report(ranks: Ranks, error: Exception | None, claim: int) -> None:
    """Raises what ``claim``, the largest of all ranks, says."""
    if not claim:
        return
    place, kind = divmod(claim, len(KINDS))
    first = ranks.world - place % (ranks.world + 1)
    if error is not None and ranks.rank == first:
        raise error
    if ranks.is_main and launched().variables is PADDLE:
        # Its launcher shows what the first process prints, and that alone.
        print(f"process {first} tells why, in workerlog.{first} of --log_dir", file=sys.stderr)
    raise KINDS[kind]("")


def check_same(ranks: Ranks, values: Mapping[str, str]) -> None:
    """Checks that all ranks have the same values. The call waits for all ranks.

    Args:
        values: name -> value, which may be a JSON object. All ranks have the same names in the same
            order.

    Raises:
        UserError: they differ, with the names, the keys of objects, and values that are short, on
            the main rank and on one that differs from it; on all ranks.
    """
    different: list[str] = []
    for name, value in values.items():
        number = int.from_bytes(sha256(value.encode()).digest()[:8], "big") % HASHES
        first = ranks.largest(number if ranks.is_main else 0)
        if other := ranks.largest(0 if number == first else ranks.rank):
            theirs = _text_of(ranks, other, value)
            different += _differences(name, value, theirs, f"process {other}")
    with together(ranks):
        if different and ranks.is_main:
            raise UserError(
                f"the {ranks.world} processes differ in {', '.join(different)}; start all of them "
                "with the same command, version, spec and data"
            )


def _text_of(ranks: Ranks, rank: int, own: str) -> str:
    """The text of one rank, on all ranks. own: the text of this rank."""
    said = own.encode() if ranks.rank == rank else b""
    size, received = ranks.largest(len(said)), b""
    for start in range(0, size, WORD):
        part = said[start : start + WORD].ljust(WORD, b"\0")
        received += ranks.largest(int.from_bytes(part, "big")).to_bytes(WORD, "big")
    return received[:size].decode()


def _differences(name: str, own: str, theirs: str, place: str) -> list[str]:
    """The names of what differs, with values if both are short. place: where ``theirs`` are."""
    if own.startswith("{") and theirs.startswith("{"):
        objects = [json.loads(text) for text in (own, theirs)]
        keys = dict.fromkeys([*objects[0], *objects[1]])
        texts = ([json.dumps(x[key]) if key in x else "missing" for x in objects] for key in keys)
        return [
            line
            for key, (here, there) in zip(keys, texts, strict=True)
            if here != there
            for line in _differences(f"{name}.{key}", here, there, place)
        ]
    short = max(len(own), len(theirs)) <= SHORT
    return [f"{name} ({own} on process 0, {theirs} on {place})" if short else name]


def sections(spec: RunSpec) -> dict[str, str]:
    """The sections of a spec as values for ``check_same``."""
    return {key: json.dumps(value) for key, value in spec.model_dump(mode="json").items()}


def program_digest() -> str:
    """A hexadecimal digest of the program's own source files."""
    total = sha256()
    for root in (Path(folder) for folder in triptych.core.__path__):
        for path in sorted([*root.rglob("*.py"), *(root.parent / "backends").rglob("*.py")]):
            total.update(path.relative_to(root.parent).as_posix().encode() + path.read_bytes())
    return total.hexdigest()
