"""What the commands of docs/results.md have measured: the file docs/results.json.

It holds the answers by command. So the page can be written, and what is missing can be measured,
where the runs are no longer there. A command whose answer is removed from it is measured again.
"""

import json
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from triptych.core.errors import UserError
from triptych.core.files.writing import write_atomically
from triptych.core.results.table import Cell, Job
from triptych.core.runs.rows import evaluation

STAMP = ("versions", "threads", "seed")
"""Keys of a training's result that the page names."""


@dataclass(frozen=True)
class Answer:
    """What a job has measured.

    Attributes:
        scores: label of a cell -> top-1, 0 to 1.
        seconds: wall time: of a training's steps, or of the whole command.
        day: when it ended, YYYY-MM-DD.
        stamp: of a training: versions, threads and seed.
    """

    scores: Mapping[str, float]
    seconds: float
    day: str
    stamp: Mapping[str, Any] = field(default_factory=dict)


def shell(job: Job) -> str:
    """The job as a line for a shell in a checkout."""
    command, *words = job.words
    return f"python tools/{command}.py {shlex.join(words)}"


class Record:
    """The answers so far.

    Args:
        path: of the file, which may be missing.

    Raises:
        UserError: the file is damaged.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            found = json.loads(path.read_text()) if path.exists() else {}
            self._answers = {line: Answer(**answer) for line, answer in found.items()}
        except (ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: damaged; remove it, and all is measured again") from error

    def answer(self, job: Job) -> Answer | None:
        """The answer of a job, or None if it has none."""
        return self._answers.get(shell(job))

    def score(self, cell: Cell) -> float | None:
        """The number of a cell, 0 to 1; None without an answer, or without such a row in it."""
        answer = self.answer(cell.job)
        return answer.scores.get(cell.label) if answer else None

    def take(self, job: Job, cells: Iterable[Cell]) -> None:
        """Reads the output of a job, and adds its answer to the file.

        Args:
            job: has its output.
            cells: of the tables that show numbers of the job.

        Raises:
            UserError: the output is damaged, or the file cannot be written.
        """
        self._answers[shell(job)] = _answer(job, cells)
        answers = {line: asdict(answer) for line, answer in sorted(self._answers.items())}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self._path, json.dumps(answers, indent=1) + "\n")


def output(job: Job) -> Path:
    """The file in which a job leaves its rows. It is there once the job is done."""
    return job.output / "result.json" if job.trains else job.output


def _answer(job: Job, cells: Iterable[Cell]) -> Answer:
    """What the output of a job says about its cells."""
    path = output(job)
    try:
        content = json.loads(path.read_text())
        rows = [evaluation(row) for row in content["evaluations" if job.trains else "rows"]]
        stamp = {key: content[key] for key in STAMP} if job.trains else {}
        seconds = content["seconds"]
    except (ValueError, KeyError) as error:
        raise UserError(f"{path}: damaged; remove it, and it is measured again") from error
    scores = {}
    last = max((row.step for row in rows), default=0)
    for cell in (cell for cell in cells if cell.job == job):
        if cell.key:
            chosen = [row for row in rows if getattr(row, cell.key, None) == cell.value]
        else:
            chosen = [row for row in rows if row.main and row.step == last]
        score = chosen[0].score if chosen else None
        if score is not None:
            scores[cell.label] = score
    day = date.fromtimestamp(path.stat().st_mtime).isoformat()
    return Answer(scores, seconds, day, stamp)
