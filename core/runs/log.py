"""The log of a run while it trains: metrics.jsonl and TensorBoard events.

A resumed run drops the rows of steps after its checkpoint, and a line that a kill cut off. So its
files have the rows of a run that was never stopped.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import FiniteFloat

from triptych.core.errors import UserError
from triptych.core.files.writing import write_atomically
from triptych.core.runs.rows import Row, Step, evaluation_model, is_known

if TYPE_CHECKING:
    from triptych.core.runs.events import Events


class _Step(Step):
    """A logged step with the keys that a resumed run needs, too."""

    chance: FiniteFloat
    feature_std: FiniteFloat
    time: FiniteFloat


def read_rows(path: Path) -> list[Row]:
    """The known rows of a metrics file up to the first damaged line; none if there is no file.

    Evaluations by a protocol that this version does not know are known rows, if they name a step.
    """
    return [row for row in _read(path)[0] if is_known(row)]


def _read(path: Path) -> tuple[list[Row], int]:
    """All rows up to the first damaged line, and the number of that line; 0 if there is none."""
    rows: list[Row] = []
    # Text after the last newline is a line that a kill cut off; a whole file has none.
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            rows.append(_row(line))
        except (ValueError, RecursionError):  # a ValidationError is a ValueError
            return rows, number
    return rows, 0


def _row(line: bytes) -> Row:
    row = json.loads(line)
    if not isinstance(row, dict):
        raise ValueError("not an object")
    if is_known(row):
        (evaluation_model(row) if "eval" in row else _Step).model_validate(row, strict=True)
    return row


def _step(row: Row) -> int:
    """The step of a row, or 0 if it names none, as an unknown row may do."""
    step = row.get("step")
    return step if isinstance(step, int) else 0


class Logs:
    """The two files of one run, opened at the step from which it goes on.

    Args:
        run_dir: an existing folder.
        step: rows of later steps are dropped; 0 for a fresh run.
        before: the folder of the run that is resumed, if it is another one than ``run_dir``.
        say: called with a warning if rows are lost to a damaged line.
    """

    def __init__(
        self,
        run_dir: Path,
        step: int,
        *,
        before: Path | None = None,
        tensorboard: bool = True,
        say: Callable[[str], None] = print,
    ) -> None:
        self.path = run_dir / "metrics.jsonl"
        earlier = (before or run_dir) / self.path.name
        rows, damaged = _read(earlier)
        if damaged:
            say(f"warning: {earlier}: line {damaged} is damaged; the log ends before it")
        rows = [row for row in rows if _step(row) <= step]
        self.kept = [row for row in rows if is_known(row)]
        """Earlier known rows of the run, up to ``step``."""
        write_atomically(self.path, "".join(json.dumps(row) + "\n" for row in rows))
        with _refusals(run_dir):
            self._file = self.path.open("a", encoding="utf-8")
            self._events = _events(run_dir, self.kept) if tensorboard else None

    def write(self, *rows: Row) -> None:
        """Appends rows, each with the key "time" (seconds since 1970).

        The rows survive a kill of the process after the call. A process that is killed during the
        call has written all of the rows or none.

        Raises:
            UserError: the disk is full.
        """
        timed = [{**row, "time": time.time()} for row in rows]
        with _refusals(self.path.parent):
            self._file.write("".join(json.dumps(row, allow_nan=False) + "\n" for row in timed))
            self._file.flush()
            if self._events:
                for row in timed:
                    self._events.write(row)

    def close(self) -> None:
        """Closes both files."""
        for file in (self._file, self._events):
            # Only text that could not be written is pending, and ``write`` has raised its error.
            with suppress(OSError):
                if file:
                    file.close()


class NoLogs:
    """Stands in for ``Logs`` in a process that does not write the log of its run."""

    kept: Sequence[Row] = ()

    def write(self, *rows: Row) -> None:
        """Writes nothing."""

    def close(self) -> None:
        """Closes nothing."""


@contextmanager
def _refusals(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{folder}: cannot write the log: {error.strerror}") from error


def _events(run_dir: Path, rows: list[Row]) -> "Events":
    from triptych.core.runs.events import Events  # loads TensorBoard, which takes a second

    return Events(run_dir, rows)
