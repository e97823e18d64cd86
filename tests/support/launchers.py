"""A command in several processes, started by a framework's own launcher, and what it has said."""

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from support.launched import SUPPORT, free_ports

from triptych.core.benchmarks.parallel import LAUNCHERS

MAIN = "import sys; from triptych.core.cli import main; sys.exit(main())\n"
MARK = "TRIPTYCH_TEST_RUN"
"""A variable that all processes of a launch inherit, wherever their parents are."""
RANKS = ("PADDLE_TRAINER_ID", "RANK")


class Launch:
    """A launcher and the processes that it has started.

    Args:
        backend: whose launcher it is.
        world: number of processes.
        words: the arguments of the command line that each process runs.
        folder: takes what they say, and a script.
        main: the program, instead of the command line.
    """

    def __init__(
        self, backend: str, world: int, words: Sequence[str], folder: Path, main: str = MAIN
    ) -> None:
        folder.mkdir(parents=True)
        script = folder / "main.py"
        script.write_text(main)
        self.backend, self._folder, self._mark = backend, folder, uuid.uuid4().hex
        given = {"world": world, "port": free_ports(1)[0], "folder": folder}
        launcher = [word.format(**given) for word in LAUNCHERS[backend]]
        paths = [str(SUPPORT.parent), os.environ.get("PYTHONPATH", "")]
        with (folder / "said.txt").open("wb") as output:
            self.launcher = subprocess.Popen(
                [sys.executable, "-m", *launcher, str(script), *words],
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)),
                     "OMP_NUM_THREADS": "1", MARK: self._mark},
                # Tests that run in the background may ignore it, and what is ignored stays so.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )  # fmt: skip

    def said(self) -> str:
        """All that the launcher and its processes have printed so far."""
        return "\n".join(map(_text, [self._folder / "said.txt", *self._logs()]))

    def errors(self) -> list[str]:
        """The lines of errors that the processes have printed."""
        # Paddle's launcher repeats what the first process prints.
        files = self._logs() if self.backend == "paddle" else [self._folder / "said.txt"]
        lines = [line for file in files for line in _text(file).splitlines()]
        return [line for line in lines if line.startswith("error:")]

    def _logs(self) -> list[Path]:
        """Files into which a launcher sends what its processes print."""
        return sorted((self._folder / "log").glob("workerlog.*"))

    def processes(self) -> dict[int, dict[str, str]]:
        """The living processes, workers too, with their variables, by number of the process."""
        found = {}
        for name in filter(str.isdecimal, os.listdir("/proc")):
            variables = _variables(int(name))
            if variables.get(MARK) == self._mark:
                found[int(name)] = variables
        return found

    def rank(self, rank: int) -> int | None:
        """The number of the process of a rank, if it is there."""
        for number, variables in self.processes().items():
            own = next((variables[name] for name in RANKS if name in variables), "")
            if own == str(rank) and _parent(number) == self.launcher.pid:
                return number
        return None

    def gone(self) -> bool:
        """Whether the launcher and all its processes have ended."""
        return self.launcher.poll() is not None and not self.processes()

    def finish(self, limit: float) -> int:
        """Waits for the end of all. Returns the launcher's status.

        Raises:
            RuntimeError: some are there after ``limit`` seconds, with all that they have said.
        """
        end = time.monotonic() + limit
        while not self.gone():
            if time.monotonic() > end:
                raise RuntimeError(f"after {limit} s: {self.processes().keys()}: {self.said()}")
            time.sleep(0.05)
        return self.launcher.returncode

    def kill(self) -> None:
        """Ends all processes that are left."""
        for number in self.processes():
            with suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        self.launcher.wait()


def _text(file: Path) -> str:
    return file.read_text(errors="replace")


def _variables(process: int) -> dict[str, str]:
    """The environment of a process as it began; empty for one that has ended."""
    try:
        text = Path(f"/proc/{process}/environ").read_bytes().decode(errors="replace")
    except OSError:
        return {}
    return {name: value for name, _, value in (line.partition("=") for line in text.split("\0"))}


def _parent(process: int) -> int:
    try:
        text = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return 0
    return int(text.rpartition(")")[2].split()[1])
