"""Runs the commands of docs/results.md that have no answer yet.

A job that has its output is not run again, and a training goes on from its last checkpoint. Where
the runs of another day are gone, the pretraining that a job needs runs again.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from triptych.core.errors import UserError
from triptych.core.files.writing import write_atomically
from triptych.core.results.answers import Record, output, shell
from triptych.core.results.page import write
from triptych.core.results.table import Job, Table, cells, jobs


def measure(tables: list[Table], record: Record, page: Path, say: Callable[[str], None]) -> None:
    """Runs every job that has no answer yet, and writes record and page after each one.

    Raises:
        UserError: a command fails, or a file cannot be written.
    """

    def measured(job: Job) -> None:
        if job.needs:
            measured(job.needs)
        if not output(job).exists():
            say(shell(job))
            _run(job)
        record.take(job, cells(tables))
        write(tables, record, page)

    for job in jobs(tables):
        if record.answer(job) is None:
            measured(job)
    write(tables, record, page)


def _run(job: Job) -> None:
    command = [sys.executable, "-m", "triptych.core.cli", *job.words]
    start = time.perf_counter()
    ended = subprocess.run(command, stdout=None if job.trains else subprocess.PIPE, check=False)
    if ended.returncode:
        raise UserError(f"status {ended.returncode} of: {shell(job)}")
    if not job.trains:
        answer = {"seconds": time.perf_counter() - start, "rows": json.loads(ended.stdout)}
        job.output.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(job.output, json.dumps(answer, indent=1) + "\n")
