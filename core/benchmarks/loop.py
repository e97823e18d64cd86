"""What the training loop costs beyond the engine's steps: schedules, draws, health, logs, terminal.

A machine's speed wanders by more than the loop costs, so it is not a difference of two times: the
time outside the engine's steps is measured while the trainer runs, and what a logged step asks of
the engine besides is measured by itself. Each step is waited for: some engines return before their
work is done, and the rest of it would count for the loop's.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from triptych.core import parameters
from triptych.core.config.spec import RunSpec
from triptych.core.contracts import Batch
from triptych.core.engine import Engine
from triptych.core.optim.plan import Plan
from triptych.core.runs.log import Logs
from triptych.core.training.terminal import Terminal
from triptych.core.training.trainer import Trainer


@dataclass
class Replay:
    """Batches from memory in place of a data pipeline: ``steps`` of them, then a pause."""

    given: Sequence[Batch]
    steps: int
    waited: float = 0.0
    skipped: Sequence[str] = ()
    warned: Sequence[tuple[str, str]] = ()

    def batches(self, start: int, _stop: int) -> Iterator[Batch]:
        """The given ones, over and over."""
        return (self.given[step % len(self.given)] for step in range(start, start + self.steps))


@dataclass
class Timed:
    """An engine whose steps are timed to their end; everything else is the engine's own."""

    engine: Engine
    wait: Callable[[], object]
    seconds: list[float] = field(default_factory=list)

    def train_step(self, *arguments: Any, **options: Any) -> Any:
        """See ``core.engine.Engine``."""
        start = time.perf_counter()
        result = self.engine.train_step(*arguments, **options)
        self.wait()
        self.seconds.append(time.perf_counter() - start)
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)


def waiter(engine: Engine) -> Callable[[], object]:
    """What returns once the engine's last update is done: a read of a tensor that it changes."""
    trained = next(param.name for param in parameters.table(engine.spec) if param.trainable)
    return engine.slots()[trained].read


def over_bare(spec: RunSpec, engine: Engine, batches: Sequence[Batch], *, rounds: int) -> float:
    """Time of the training loop over that of bare steps.

    Saves and evaluations are the user's to choose and are not in it.

    Args:
        rounds: logging intervals that are measured.
    """
    steps = spec.log.every * rounds
    timed = Timed(engine, waiter(engine))
    with tempfile.TemporaryDirectory() as folder:
        logs, terminal = Logs(Path(folder), 0), Terminal(spec.train.steps or 0)
        with closing(logs), closing(terminal):
            trainer = Trainer(
                spec,
                cast(Engine, timed),
                Replay(batches, steps),
                Plan(spec, steps),
                Path(folder),
                logs,
                terminal,
                evaluate=lambda _step, _check: [],
            )
            start = time.perf_counter()
            trainer.fit()
            outside = time.perf_counter() - start - sum(timed.seconds)
    added = outside / steps + _norm(engine) / spec.log.every
    return 1.0 + added / statistics.median(timed.seconds)


def _norm(engine: Engine) -> float:
    """Seconds for the gradient norm of the last step, which logged steps want."""
    start = time.perf_counter()
    engine.read({"gradient_norm": engine.gradient_norm()})
    return time.perf_counter() - start
