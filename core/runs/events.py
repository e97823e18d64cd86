"""The TensorBoard event file of a run. Importing this module takes a second."""

import socket
import time
from collections.abc import Sequence
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from triptych.core.runs.rows import Row, evaluation


class Events:
    """A new event file with the rows of the run so far. It replaces the earlier event files."""

    def __init__(self, run_dir: Path, rows: Sequence[Row]) -> None:
        earlier = list(run_dir.glob("events.out.tfevents.*"))
        name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}"
        self._writer = RecordWriter((run_dir / name).open("wb"))
        head = Event(file_version="brain.Event:2", wall_time=time.time())
        for event in (head, *map(_event, rows)):
            self._writer.write(event.SerializeToString())
        self._writer.flush()
        for path in earlier:
            path.unlink()

    def write(self, row: Row) -> None:
        """Appends a row, which survives a kill of the process after the call."""
        self._writer.write(_event(row).SerializeToString())
        self._writer.flush()

    def close(self) -> None:
        """Closes the file."""
        self._writer.close()


def _event(row: Row) -> Event:
    """The numbers of a row; those of an evaluation are named after it, e.g. knn/10/top1."""
    prefix = f"{evaluation(row).tag}/" if "eval" in row else ""
    values = [
        Summary.Value(tag=prefix + name, simple_value=value)
        for name, value in row.items()
        if isinstance(value, float) and name != "time"
    ]
    stamp = row.get("time")
    seconds = stamp if isinstance(stamp, float) else 0.0  # rows of other programs may have no time
    return Event(step=row["step"], wall_time=seconds, summary=Summary(value=values))
