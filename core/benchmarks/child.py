"""A part of a benchmark in a process of its own, whose peak memory is that part's alone."""

import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from triptych.core.errors import UserError


def answer(name: str, words: Sequence[str]) -> Any:
    """The JSON that a benchmark prints last.

    Args:
        name: of the part, for an error.
        words: of the command, after ``bench``.

    Raises:
        UserError: the process fails; gives the last line of its errors.
    """
    command = [sys.executable, "-m", "triptych.core.cli", "bench", *words]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        (*_, last) = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
        raise UserError(f"{name}: the benchmark failed: {last.removeprefix('error: ')}")
    return json.loads(done.stdout.splitlines()[-1])
