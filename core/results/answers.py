"""What the commands of docs/results.md have measured so far."""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any

from triptych.core.errors import UserError
from triptych.core.results.table import Cell, Job
from triptych.core.runs.rows import evaluation


@dataclass(frozen=True)
class Answer:
    """What a job has measured.

    Attributes:
        rows: evaluation rows.
        seconds: wall time: of a training's steps, or of the whole command.
        day: when it ended, YYYY-MM-DD.
        stamp: of a training: versions, threads, seed and steps.
    """

    rows: Sequence[Mapping[str, Any]]
    seconds: float
    day: str
    stamp: Mapping[str, Any]


def shell(job: Job) -> str:
    """The job as a line for a shell in a checkout."""
    command, *words = job.words
    return f"python tools/{command}.py {shlex.join(words)}"


def read(job: Job) -> Answer | None:
    """The answer of a job, or None if it has none.

    Raises:
        UserError: its file is damaged.
    """
    path = job.output / "result.json" if job.trains else job.output
    try:
        content = json.loads(path.read_text())
        rows = content["evaluations" if job.trains else "rows"]
        seconds = content["seconds"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError) as error:
        raise UserError(f"{path}: damaged; remove it, and it is measured again") from error
    day = date.fromtimestamp(path.stat().st_mtime).isoformat()
    return Answer(rows, seconds, day, content if job.trains else {})


def score(cell: Cell) -> float | None:
    """The number of a cell, 0 to 1; None without an answer, or without such a row in it."""
    answer = read(cell.job)
    rows = [evaluation(row) for row in (answer.rows if answer else ())]
    if cell.key:
        chosen = [row for row in rows if getattr(row, cell.key, None) == cell.value]
    else:
        last = max((row.step for row in rows), default=0)
        chosen = [row for row in rows if row.main and row.step == last]
    return chosen[0].score if chosen else None
