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
SHORT = 24
"""Most characters of a value that a message shows."""


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
        values: name -> value. All ranks have the same names in the same order.

    Raises:
        UserError: they differ, with the names and what is short on the main rank; on all ranks.
    """
    different = []
    for name, value in values.items():
        number = int.from_bytes(sha256(value.encode()).digest()[:8], "big") % HASHES
        if ranks.largest(number) != HASHES - ranks.largest(HASHES - number):
            shown = f" ({value} on process 0)" if len(value) <= SHORT else ""
            different.append(f"{name}{shown}")
    with together(ranks):
        if different and ranks.is_main:
            raise UserError(
                f"the {ranks.world} processes differ in {', '.join(different)}; start all of them "
                "with the same command, version, spec and data"
            )


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
