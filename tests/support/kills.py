"""Kills a run with SIGKILL at random moments, resumes it each time, and compares what is left.

    python tests/support/kills.py --backend torch

The final state and the log have to be bit for bit those of a run that was left alone, with and
without worker processes, and no process may be left behind.
"""

import argparse
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from triptych.core import checkpoint
from triptych.core.contracts import State
from triptych.core.runs.log import read_rows
from triptych.core.runs.rows import Row

MAIN = "import sys; from triptych.core.cli import main; sys.exit(main())"
SMALL = (
    "train.batch_size=64",
    "model.depth=2",
    "optim.warmup_steps=10",
    "checkpoint.every=7",
    "checkpoint.keep=2",
    "log.every=1",
    "evaluate.every=30",
    "threads=1",
)
"""Short steps and many checkpoints, so that kills fall into both."""
SPARED = 10
"""Last steps in which no kill is planned: a run must not end before it is killed."""
EARLY = 0.3
"""Share of the kills that come before the first step: while resuming, above all."""
TIMED = ("images_per_second", "data_wait", "time", "evaluate_share")
"""What equal runs may log differently."""
LIMIT = 300.0
"""Seconds in which something has to happen."""


@dataclass(frozen=True)
class Pace:
    """Of an undisturbed run. startup: seconds to its first step; step: seconds for each."""

    startup: float
    step: float


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the campaign and prints it; 1 where anything differs."""
    parser = argparse.ArgumentParser(prog="kills", description=__doc__.partition("\n")[0])
    parser.add_argument("--backend", required=True)
    parser.add_argument("-c", "--config", default="moco_v3/digits")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--seed", type=int, help="of the moments; default: another each time")
    parser.add_argument("--output", type=Path, default=Path("runs/soak"))
    arguments = parser.parse_args(argv)
    seed = time.time_ns() % 10**6 if arguments.seed is None else arguments.seed
    print(f"{arguments.backend}: {arguments.kills} kills in {arguments.steps} steps, seed {seed}")
    folder = arguments.output / arguments.backend
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    command = [
        *(sys.executable, "-c", MAIN, "train", "-c", arguments.config),
        *("--backend", arguments.backend, "-o", *SMALL, f"train.steps={arguments.steps}"),
    ]
    pace = _undisturbed(command, folder / "undisturbed", arguments.steps)
    problems = []
    for workers in arguments.workers:
        run_dir = folder / f"killed-{workers}-workers"
        moments = random.Random(f"{seed} {workers}")
        targets = sorted(moments.sample(range(arguments.steps - SPARED), arguments.kills))
        print(f"workers {workers}: kill after step", end="", flush=True)
        resumed = [*command, f"data.workers={workers}"]
        problems += _campaign(resumed, run_dir, targets, moments, pace)
        found = compare(folder / "undisturbed", run_dir)
        print("; differs from" if found else "; bit-identical to", "the undisturbed run")
        problems += [f"workers {workers}: {problem}" for problem in found]
    print("\n".join(problems) or "nothing differs, nothing is left behind")
    return 1 if problems else 0


def _undisturbed(command: Sequence[str], run_dir: Path, steps: int) -> Pace:
    began = time.monotonic()
    process = _start(command, run_dir)
    wait_until(partial(_reached, process, run_dir, 1, 0))
    startup = time.monotonic() - began
    _finish(process, run_dir)
    return Pace(startup, (time.monotonic() - began - startup) / steps)


def _campaign(
    command: Sequence[str],
    run_dir: Path,
    targets: Sequence[int],
    moments: random.Random,
    pace: Pace,
) -> list[str]:
    """Starts, kills and starts again, then lets the run end; returns what went wrong.

    Args:
        targets: a start is killed at a random moment soon after it logs this step, or, some of
            them, at any moment before its first step.
    """
    problems = []
    for target in targets:
        log = log_of(run_dir)
        process = _start(command, run_dir)
        if moments.random() < EARLY:
            begun = partial(_reached, process, run_dir, -1, log)
            wait_until(begun, moments.uniform(0.0, pace.startup))
        else:
            wait_until(partial(_reached, process, run_dir, target, log))
            time.sleep(moments.uniform(0.0, 3 * pace.step))
        if process.poll() is not None:
            problems.append(f"the run had ended before its kill at step {target}")
            _finish(process, run_dir)
        process.kill()
        process.wait()
        print(f" {last_step(run_dir)}", end="", flush=True)
        if not _gone(process.pid):
            problems.append(f"a process outlived the kill at step {target}")
    _finish(_start(command, run_dir), run_dir)
    return problems


def compare(expected: Path, actual: Path) -> list[str]:
    """What differs between two runs: newest checkpoints bit for bit, and the logs but for times."""
    (step, a), (other, b) = (_newest(folder) for folder in (expected, actual))
    found = [] if step == other else [f"step {other} instead of {step}"]
    found += [f"{name}: only in one of the runs" for name in sorted(a.keys() ^ b.keys())]
    for name in sorted(a.keys() & b.keys()):
        if a[name].dtype != b[name].dtype or a[name].tobytes() != b[name].tobytes():
            found.append(f"{name}: differs")
    rows, others = (list(_untimed(folder / "metrics.jsonl")) for folder in (expected, actual))
    if len(rows) != len(others):
        found.append(f"metrics.jsonl: {len(others)} rows instead of {len(rows)}")
    pairs = zip(rows, others, strict=False)
    found += [f"metrics.jsonl: {b} instead of {a}" for a, b in pairs if a != b][:1]
    return found


def _newest(run_dir: Path) -> tuple[int, State]:
    path = checkpoint.latest(run_dir, print)
    if path is None:
        return 0, {}
    manifest, state = checkpoint.read(path)
    return manifest.step, state


def _untimed(path: Path) -> Iterator[Row]:
    for row in read_rows(path):
        yield {name: value for name, value in row.items() if name not in TIMED}


def last_step(run_dir: Path) -> int:
    """The last step in a run's log; 0 without a log."""
    rows = read_rows(run_dir / "metrics.jsonl")
    return int(rows[-1]["step"]) if rows else 0


def log_of(run_dir: Path) -> int:
    """Identity of the log; a run that resumes begins with a new file."""
    path = run_dir / "metrics.jsonl"
    return path.stat().st_ino if path.exists() else 0


def _reached(process: subprocess.Popen[bytes], run_dir: Path, target: int, former: int) -> bool:
    own = log_of(run_dir) != former and last_step(run_dir) >= target
    return own or process.poll() is not None


def _start(command: Sequence[str], run_dir: Path) -> subprocess.Popen[bytes]:
    """A run in a process group of its own; what it says goes to a file beside its folder."""
    with _output(run_dir).open("wb") as output:
        return subprocess.Popen(
            [*command, "--output", str(run_dir), "--resume", "auto"],
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _output(run_dir: Path) -> Path:
    return run_dir.with_name(f"{run_dir.name}.txt")


def _finish(process: subprocess.Popen[bytes], run_dir: Path) -> None:
    """Waits for the end. Raises RuntimeError, with what a run that fails has said."""
    if process.wait(LIMIT):
        said = _output(run_dir).read_text(errors="replace")
        raise RuntimeError(f"exit status {process.returncode}: {said}")


def _gone(group: int) -> bool:
    """Whether all processes of a group end by themselves."""

    def empty() -> bool:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        return False

    return wait_until(empty, 10.0)


def wait_until(condition: Callable[[], bool], limit: float = LIMIT) -> bool:
    """Waits for a condition. Returns whether it came true within ``limit`` seconds."""
    end = time.monotonic() + limit
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.002)
    return True


if __name__ == "__main__":
    sys.exit(main())
