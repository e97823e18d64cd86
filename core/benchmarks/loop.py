"""Cost of the training loop around the engine's steps: schedules, draws, health, logs, terminal.

The speed of a machine varies by more than the loop costs, so a difference of two timings would not
show the cost. Instead the time outside the engine's steps is measured while the trainer runs. The
extra work of the engine in a logged step is measured by itself. The timing waits for the end of
each step: some engines return earlier, and the rest of their work would count as the loop's.
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
    """A stand-in for the data pipeline that repeats batches from memory.

    Attributes:
        given: the batches.
        steps: number of batches in one call of ``batches``.
    """

    given: Sequence[Batch]
    steps: int
    waited: float = 0.0
    skipped: Sequence[str] = ()
    warned: Sequence[tuple[str, str]] = ()

    def batches(self, start: int, _stop: int) -> Iterator[Batch]:
        """``steps`` batches: the given ones, over and over."""
        return (self.given[step % len(self.given)] for step in range(start, start + self.steps))


@dataclass
class Timed:
    """An engine whose steps are timed to their end; all else is passed on to the engine."""

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
    """A function that waits for the engine's last update: it reads a trained tensor."""
    trained = next(param.name for param in parameters.table(engine.spec) if param.trainable)
    return engine.slots()[trained].read


def over_bare(spec: RunSpec, engine: Engine, batches: Sequence[Batch], *, rounds: int) -> float:
    """Time of a step in the training loop divided by the time of a bare engine step.

    Saves and evaluations are left out, since their number is the user's choice.

    Args:
        rounds: number of measured logging intervals.
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
    """Seconds for the gradient norm of the last step, which each logged step computes."""
    start = time.perf_counter()
    engine.read({"gradient_norm": engine.gradient_norm()})
    return time.perf_counter() - start
