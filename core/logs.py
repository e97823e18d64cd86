"""What a run records while it trains: metrics.jsonl and TensorBoard events.

Both are resume-safe: rows of steps after the checkpoint that a run resumes from are dropped, and
so is a line that a kill has torn. The files of a resumed run are those of one never stopped.
"""

import json
import time
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from triptych.core.errors import UserError
from triptych.core.files import write_atomically

Row = dict[str, Any]
"""One logged step or one evaluation (which carries "eval"); plain JSON values."""


def read_rows(path: Path) -> list[Row]:
    """The rows of a metrics file up to the first damaged line; none if there is no file."""
    rows: list[Row] = []
    if not path.exists():
        return rows
    # What follows the last newline was cut off by a kill; a whole file ends with an empty piece.
    for line in path.read_bytes().split(b"\n")[:-1]:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


class Logs:
    """The two files of one run, opened at the step from which it goes on.

    Args:
        run_dir: exists.
        step: rows of later steps are dropped; 0 for a fresh run.
        before: the folder of the run that goes on here, where it is another one.
    """

    def __init__(
        self, run_dir: Path, step: int, *, before: Path | None = None, tensorboard: bool = True
    ) -> None:
        self.path = run_dir / "metrics.jsonl"
        rows = read_rows((before or run_dir) / self.path.name)
        self.kept = [row for row in rows if row["step"] <= step]
        """The rows that were there and stay."""
        write_atomically(self.path, "".join(json.dumps(row) + "\n" for row in self.kept))
        self._file = self.path.open("a", encoding="utf-8")
        self._events = EventFileWriter(str(run_dir)) if tensorboard else None
        if self._events:
            # Tells readers that events of these steps in older files are void.
            self._events.add_event(
                Event(
                    step=step + 1,
                    wall_time=time.time(),
                    session_log=SessionLog(status=SessionLog.START),
                )
            )

    def write(self, row: Row) -> None:
        """Appends a row; it is in the hands of the operating system when this returns.

        Raises:
            UserError: the disk is full.
        """
        try:
            self._file.write(json.dumps(row, allow_nan=False) + "\n")
            self._file.flush()
            if self._events:
                self._events.add_event(_event(row))
                self._events.flush()
        except OSError as error:
            raise UserError(f"{self.path.parent}: cannot write: {error.strerror}") from error

    def close(self) -> None:
        """Closes both files."""
        self._file.close()
        if self._events:
            self._events.close()


def _event(row: Row) -> Event:
    """The numbers of a row; those of an evaluation are named after it, e.g. knn/10/top1."""
    prefix = f"{row['eval']}/{row['labels']}/" if "eval" in row else ""
    values = [
        Summary.Value(tag=prefix + name, simple_value=value)
        for name, value in row.items()
        if isinstance(value, float)
    ]
    return Event(step=row["step"], wall_time=time.time(), summary=Summary(value=values))
