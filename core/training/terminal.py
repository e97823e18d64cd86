"""Output of a run: plain lines, and on a terminal a progress bar below them."""

import sys
import time
from collections.abc import Sequence
from contextlib import suppress

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from triptych.core.errors import printable
from triptych.core.runs.rows import Row

PAUSE = 1.0
"""Least seconds between two lines without news. All of them are in metrics.jsonl."""


class Terminal:
    """Prints lines and the progress bar.

    Args:
        total: last step of the run.
        step: step at which the run starts.
        shown: False in the processes beside the main one, which print nothing.
        title: of the bar.
    """

    lost: OSError | None = None
    """The error of the first failed print, e.g. since the disk of the log is full, or None."""

    def __init__(
        self, total: int, step: int = 0, *, shown: bool = True, title: str = "training"
    ) -> None:
        self._shown = shown
        self._said = 0.0
        self._warned: set[str] = set()
        self._progress: Progress | None = None
        if shown and sys.stdout.isatty():
            columns = (TextColumn(title), BarColumn(None), MofNCompleteColumn())
            self._progress = Progress(*columns, TimeRemainingColumn(), console=Console())
            self._task = self._progress.add_task(title, total=total, completed=step)
            self._progress.start()

    def line(self, text: str) -> None:
        """Prints one line above the bar. If that fails, ``lost`` holds the error."""
        if self.lost or not self._shown:
            return
        try:
            if self._progress:
                self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)
            else:
                print(text, flush=True)
        except OSError as error:
            self.lost = OSError(error.errno, error.strerror, "standard output")

    def warning(self, name: str, text: str) -> None:
        """Prints a library's warning about a file, once in a run for each file."""
        if name not in self._warned:
            self._warned.add(name)
            self.line(f"warning: {printable(name)}: {printable(text)}")

    def status(self, text: str, *, news: bool) -> None:
        """Prints a line, unless it has no news and the last one is less than ``PAUSE`` old."""
        if news or time.monotonic() - self._said >= PAUSE:
            self._said = time.monotonic()
            self.line(text)

    def advance(self, step: int) -> None:
        """Moves the bar."""
        if self._progress:
            self._progress.update(self._task, completed=step)

    def close(self) -> None:
        """Leaves the terminal as it was."""
        if self._progress:
            with suppress(OSError):  # the terminal may be gone
                self._progress.stop()


def health_line(row: Row, total: int, own: Sequence[str] = ()) -> str:
    """A logged step in one line.

    Args:
        total: number of steps of the schedules.
        own: parts that the method adds (``core.contracts.Method.status``).
    """
    parts = [
        f"step {row['step']}/{total} loss {row['loss']:.3f} (chance {row['chance']:.3f}) "
        f"{row['state']}",
        f"feature std {row['feature_std']:.2f}",
        *own,
        f"grad {row['gradient_norm']:.3g}" if "gradient_norm" in row else "update left out",
        f"lr {_scientific(row['lr'])}",
        f"ema {row['ema']:.4g}",
        f"{row['images_per_second']:.0f} img/s",
        f"data wait {100 * row['data_wait']:.0f} %",
    ]
    if row.get("skipped"):
        parts.append(f"{row['skipped']} damaged files skipped")
    return " | ".join(parts)


def _scientific(value: float) -> str:
    """Formats 0.001 as 1.0e-3, not as 1.0e-03."""
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"
