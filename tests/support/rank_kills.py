"""Kills one process of a run at random moments, resumes the run each time, compares what is left.

    PYTHONPATH=tests python tests/support/rank_kills.py --backend torch --axis tensor

The framework's launcher starts two processes, one of which gets SIGKILL: at a random moment of the
start, of a step, of a save or of an evaluation. All of them have to be gone soon, with one line of
error, and nothing that was saved may be lost. In the end, state and log have to be bit for bit
those of a run of the same layout that was left alone.
"""

import argparse
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from support.kills import LIMIT, Pace, compare, last_step, log_of, wait_until
from support.launchers import Launch

from triptych.core import checkpoint
from triptych.core.runs.log import read_rows

AXES = {
    "data": ("parallel.data=2",),
    "tensor": ("parallel.tensor=2",),
    "pipeline": ("parallel.pipeline=2", "parallel.micro_batches=2"),
    "shard_optimizer": ("parallel.data=2", "parallel.shard_optimizer=true"),
}
MOMENTS = ("save", "evaluation", "step", "start") * 2 + ("step",) * 2
"""Moments of ten kills. Fewer kills are at the first ones; their order in a run is random."""
GONE = 30.0
"""Seconds in which all processes have to end."""
SMALL = (
    *("train.batch_size=16", "model.depth=2", "model.width=16", "model.image_size=8"),
    *("method.hidden_dim=32", "method.output_dim=16", "optim.warmup_steps=10", "threads=1"),
    *("checkpoint.every=5", "checkpoint.keep=2", "log.every=1", "log.tensorboard=false"),
    *("evaluate.every=10", "evaluate.per_class=[5]"),
)
"""Short steps, and many saves and evaluations."""


@dataclass(frozen=True)
class Kill:
    """A kill that is to come.

    Attributes:
        moment: one of ``MOMENTS``.
        step: that has to be logged before, unless the moment is "start".
        rank: of the process.
        delay: share of a start or a step that passes before the kill.
        workers: number of workers that load data for each process.
    """

    moment: str
    step: int
    rank: int
    delay: float
    workers: int


@dataclass(frozen=True)
class Campaign:
    """Runs of one command in the folder ``folder``."""

    backend: str
    words: Sequence[str]
    folder: Path

    def launch(self, run_dir: Path, name: str, *overrides: str) -> Launch:
        """Starts the run, or resumes it."""
        words = [*self.words, *overrides, "--output", str(run_dir), "--resume", "auto"]
        return Launch(self.backend, 2, words, self.folder / name)

    def whole(self, run_dir: Path, name: str) -> Pace:
        """Lets a run come to its end.

        Raises:
            RuntimeError: it fails or hangs.
        """
        begun, log = time.monotonic(), log_of(run_dir)
        launch = self.launch(run_dir, name)
        try:
            wait_until(lambda: log_of(run_dir) != log or launch.gone())
            startup, first = time.monotonic() - begun, last_step(run_dir)
            if launch.finish(LIMIT):
                raise RuntimeError(launch.said())
        finally:
            launch.kill()
        steps = max(last_step(run_dir) - first, 1)
        return Pace(startup, (time.monotonic() - begun - startup) / steps)

    def kill(self, run_dir: Path, kill: Kill, number: int, pace: Pace) -> list[str]:
        """Starts the run and kills one of its processes. Returns what went wrong."""
        log = log_of(run_dir)
        launch = self.launch(run_dir, f"kill-{number}", f"data.workers={kill.workers}")
        try:
            _wait(launch, run_dir, kill, pace, log)
            victim, newest = launch.rank(kill.rank), saved_step(run_dir)
            if victim is None:
                return [f"{kill}: the process is not there: {launch.said()}"]
            os.kill(victim, signal.SIGKILL)
            begun = time.monotonic()
            if not wait_until(launch.gone, GONE):
                return [f"{kill}: left after {GONE} s: {launch.processes().keys()}"]
            problems = judged(launch, kill, newest, saved_step(run_dir))
            print(f" {kill.moment} {last_step(run_dir)}: {time.monotonic() - begun:.1f} s;",
                  end="", flush=True)  # fmt: skip
            return problems
        finally:
            launch.kill()


def _wait(launch: Launch, run_dir: Path, kill: Kill, pace: Pace, log: int) -> None:
    """Waits for the moment of a kill."""
    if kill.moment == "start":
        wait_until(lambda: launch.rank(kill.rank) is not None or launch.gone())
        time.sleep(kill.delay * pace.startup)
        return
    reached = {
        "step": lambda: True,
        "save": lambda: any((run_dir / "checkpoints").glob(".step-*.tmp")),
        "evaluation": lambda: _evaluates(run_dir),
    }[kill.moment]
    _until(launch, lambda: log_of(run_dir) != log and last_step(run_dir) >= kill.step)
    _until(launch, reached)
    if kill.moment == "step":
        time.sleep(3 * kill.delay * pace.step)


def _until(launch: Launch, condition: Callable[[], bool]) -> None:
    wait_until(lambda: condition() or launch.launcher.poll() is not None)


def _evaluates(run_dir: Path) -> bool:
    """Whether the newest step is saved, and its evaluation is not logged yet."""
    row = (read_rows(run_dir / "metrics.jsonl") or [{"step": 1, "eval": ""}])[-1]
    return "eval" not in row and not row["step"] % 10 and saved_step(run_dir) == row["step"]


def saved_step(run_dir: Path) -> int:
    """Step of the newest whole checkpoint."""
    path = checkpoint.latest(run_dir, lambda text: None)
    return checkpoint.read(path)[0].step if path else 0


def judged(launch: Launch, kill: Kill, before: int, after: int) -> list[str]:
    """What is wrong after a kill. before, after: steps of the newest checkpoints."""
    problems = []
    if after < before:
        problems.append(f"{kill}: step {before} was saved, now {after} is the newest")
    if launch.launcher.returncode == 0:
        problems.append(f"{kill}: the launcher's exit status is 0")
    least = int(kill.moment != "start")  # before they meet, only the launcher knows of the others
    if not least <= len(launch.errors()) <= 1:
        problems.append(f"{kill}: {len(launch.errors())} lines of error: {launch.said()}")
    return problems


def planned(chance: random.Random, steps: int, count: int) -> list[Kill]:
    """The kills of a campaign, at growing steps, so that each run goes on where one was killed."""
    chosen = [MOMENTS[i % len(MOMENTS)] for i in range(count)]
    chance.shuffle(chosen)
    at = sorted(chance.sample(range(1, steps - 12), count))
    return [
        Kill(moment, step, chance.randrange(2), chance.random(), chance.randrange(2))
        for moment, step in zip(chosen, at, strict=True)
    ]


def campaign(backend: str, axis: str, folder: Path, seed: int, kills: int, steps: int) -> list[str]:
    """What went wrong in a campaign of kills."""
    print(f"{backend}, {axis}, seed {seed}:", end="", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    words = ["train", "-c", "moco_v3/digits", "--backend", backend]
    words += ["-o", *SMALL, *AXES[axis], f"train.steps={steps}"]
    runs = Campaign(backend, words, folder)
    pace = runs.whole(folder / "undisturbed", "alone")
    problems = []
    for number, kill in enumerate(planned(random.Random(f"{seed} {axis}"), steps, kills)):
        problems += runs.kill(folder / "killed", kill, number, pace)
    runs.whole(folder / "killed", "last")
    problems += compare(folder / "undisturbed", folder / "killed")
    print(" differs" if problems else " bit-identical")
    return problems


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a campaign and prints it; 1 where anything went wrong."""
    parser = argparse.ArgumentParser(prog="rank_kills", description=__doc__.partition("\n")[0])
    parser.add_argument("--backend", required=True)
    parser.add_argument("--axis", choices=AXES, required=True)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, help="of the moments; default: another each time")
    parser.add_argument("--output", type=Path, default=Path("runs/soak"))
    given = parser.parse_args(argv)
    seed = time.time_ns() % 10**6 if given.seed is None else given.seed
    folder = given.output / f"{given.backend}-{given.axis}"
    problems = campaign(given.backend, given.axis, folder, seed, given.kills, given.steps)
    print("\n".join(problems) or "nothing differs, nothing is left behind")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
