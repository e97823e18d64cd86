"""The log of a run while it trains: metrics.jsonl and TensorBoard events.

A resumed run drops the rows of steps after its checkpoint, and a line that a kill cut off. So its
files have the rows of a run that was never stopped.
"""

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import FiniteFloat

from triptych.core.errors import UserError
from triptych.core.files.writing import write_atomically
from triptych.core.runs.rows import Row, Step, evaluation_model

if TYPE_CHECKING:
    from triptych.core.runs.events import Events


class _Step(Step):
    """A logged step with the keys that a resumed run needs, too."""

    chance: FiniteFloat
    feature_std: FiniteFloat
    time: FiniteFloat


def read_rows(path: Path) -> list[Row]:
    """The rows of a metrics file up to the first damaged line; none if there is no file.

    Rows of evaluations that this version does not know are returned, too.
    """
    rows: list[Row] = []
    if not path.exists():
        return rows
    # Text after the last newline is a line that a kill cut off; a whole file has none.
    for line in path.read_bytes().split(b"\n")[:-1]:
        try:
            row = json.loads(line)
            evaluated = isinstance(row, dict) and "eval" in row
            (evaluation_model(row) if evaluated else _Step).model_validate(row, strict=True)
        except (ValueError, RecursionError):  # a ValidationError is a ValueError
            break
        rows.append(row)
    return rows


class Logs:
    """The two files of one run, opened at the step from which it goes on.

    Args:
        run_dir: an existing folder.
        step: rows of later steps are dropped; 0 for a fresh run.
        before: the folder of the run that is resumed, if it is another one than ``run_dir``.
    """

    def __init__(
        self, run_dir: Path, step: int, *, before: Path | None = None, tensorboard: bool = True
    ) -> None:
        self.path = run_dir / "metrics.jsonl"
        rows = read_rows((before or run_dir) / self.path.name)
        self.kept = [row for row in rows if row["step"] <= step]
        """Earlier rows of the run, up to ``step``."""
        write_atomically(self.path, "".join(json.dumps(row) + "\n" for row in self.kept))
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
