"""What the training loop costs beyond the engine's steps: schedules, draws, health, logs, terminal.

The same engine takes the same batches, now called directly and now by the trainer, in turns.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from triptych.core.config.spec import RunSpec
from triptych.core.engine import Batch, Engine
from triptych.core.logs import Logs
from triptych.core.plan import Plan
from triptych.core.terminal import Terminal
from triptych.core.trainer import Trainer

Turns = Mapping[str, Callable[[], object]]


@dataclass
class Replay:
    """Batches from memory in place of a data pipeline: ``steps`` of them, then a pause."""

    given: Sequence[Batch]
    steps: int
    waited: float = 0.0
    skipped: Sequence[str] = ()

    def batches(self, start: int, _stop: int) -> Iterator[Batch]:
        """The next batches, over and over."""
        return (self.given[step % len(self.given)] for step in range(start, start + self.steps))


def over_bare(
    spec: RunSpec,
    engine: Engine,
    batches: Sequence[Batch],
    bare: Callable[[int], None],
    *,
    rounds: int,
) -> float:
    """Time of the training loop over that of bare steps: median over ``rounds`` turns.

    Each turn is as long as the recipe's logging interval, so one logged step is in it. Saves and
    evaluations are the user's to choose and are not in it.

    Args:
        bare: one step of the engine with the batch of that number, awaited.
    """
    steps = max(spec.log.every, 1)
    with tempfile.TemporaryDirectory() as folder:
        logs, terminal = Logs(Path(folder), 0), Terminal(spec.train.steps or 0)
        with closing(logs), closing(terminal):
            trainer = Trainer(
                spec,
                engine,
                Replay(batches, steps),
                Plan(spec, steps),
                Path(folder),
                logs,
                terminal,
                evaluate=lambda _step: [],
            )
            turns: Turns = {"bare": partial(_repeat, bare, steps), "loop": trainer.fit}
            for turn in turns.values():
                turn()
            ratios = [_ratio(turns, swap=bool(i % 2)) for i in range(rounds)]
    return statistics.median(ratios)


def _repeat(step: Callable[[int], None], times: int) -> None:
    for i in range(times):
        step(i)


def _ratio(turns: Turns, *, swap: bool) -> float:
    seconds = {}
    for name in sorted(turns, reverse=swap):
        start = time.perf_counter()
        turns[name]()
        seconds[name] = time.perf_counter() - start
    return seconds["loop"] / seconds["bare"]
