"""The training loop: steps of an engine, with logs, saves and evaluations at their intervals.

A resumed run needs the engine's state and the step: batches, draws and hyper-parameters are
functions of the step. The health of the run comes from the logged rows, and the training time from
the checkpoint.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache, partial
from math import isfinite
from pathlib import Path
from signal import SIGTERM
from typing import Any, Protocol

from triptych.core import checkpoint
from triptych.core.config.spec import RunSpec
from triptych.core.contracts import ALONE, Batch, Ranks
from triptych.core.engine import Engine
from triptych.core.errors import DeviceError, NonFiniteError, Stopped, UserError, printable
from triptych.core.evaluation.row import Evaluation
from triptych.core.evaluation.sharing import Sharing
from triptych.core.evaluation.subject import Check
from triptych.core.methods import METHODS
from triptych.core.methods.health import Health, alike, first_non_finite
from triptych.core.optim.plan import Plan
from triptych.core.parallel.agreement import together, whole
from triptych.core.runs.log import Logs, NoLogs
from triptych.core.runs.rows import Row, evaluation
from triptych.core.training.met import Files, Reader
from triptych.core.training.meter import Meter
from triptych.core.training.saving import Background, Streamed, Types
from triptych.core.training.signals import StopRequest, stop_request
from triptych.core.training.terminal import Terminal, health_line

Reading = Callable[[], dict[str, float]]


class Feed(Reader, Protocol):
    """What the trainer uses of ``core.data.Pipeline``."""

    waited: float
    """Seconds spent waiting for batches so far."""

    def batches(self, start: int, stop: int, /) -> Iterator[Batch]:
        """The batches of the steps ``start`` … ``stop - 1``."""


class _DataError(UserError):
    """The data cannot be read. After this error the state can still be saved."""


@contextmanager
def _data_errors() -> Iterator[None]:
    try:
        yield
    except UserError as error:
        raise _DataError(str(error)) from error


@dataclass
class Trainer:
    """Trains from ``step`` to the plan's last step.

    Attributes:
        evaluate: (step, check) -> result rows; it calls ``check`` between batches.
        stamp: values that checkpoints store beside the state.
        step: number of updates behind the engine's state.
        saved: the newest checkpoint of the state, or None.
        seconds: training time before ``step``.
        evaluating: time of the evaluations before ``step``.
        foreign: number of updates that another system did before.
    """

    spec: RunSpec
    engine: Engine
    pipeline: Feed
    plan: Plan
    run_dir: Path
    logs: Logs | NoLogs
    terminal: Terminal
    evaluate: Callable[[int, Check], Sequence[Evaluation]]
    stamp: Mapping[str, Any] = field(default_factory=dict)
    step: int = 0
    saved: Path | None = None
    seconds: float = 0.0
    evaluating: float = 0.0
    foreign: int = 0
    ranks: Ranks = ALONE

    def __post_init__(self) -> None:
        """Sets the health of the run from the logged rows of earlier steps."""
        self.method = METHODS[self.spec.method.name]
        self._types = Types(self.engine)
        self._background = Background(self.ranks)
        self._files = Files(self.pipeline, Sharing(self.engine))
        self._reading: Reading = dict
        """Reads and checks the metrics of the newest step; later calls repeat the answer."""
        self.meter = Meter(self.spec.train.batch_size, self.seconds, self.evaluating)
        chance = self.method.chance(self.spec)
        self.health = Health(chance, self.method.FLAT, self.method.REMEDY)
        for row in self.logs.kept:
            if "eval" in row:
                self._judge(evaluation(row))
            else:
                self._observe(row["step"], row, row["chance"])
                self.health.advice(row["step"] / self.plan.total_steps)

    def fit(self) -> int | None:
        """Trains to the last step, or until a signal asks for a stop.

        Returns:
            The signal that ended the run early, with the state saved, or None.

        Raises:
            NonFiniteError: the loss or the state is not finite; names the last good checkpoint.
            UserError: the data cannot be read (the state is saved then), or the state cannot be
                written.
            OSError: standard output cannot be written; the state is saved.
        """
        try:
            with stop_request() as stop:
                signal = self._fit(stop)
                # The signal may have come to another process only, and will come to this one.
                stop.number = stop.number or signal
            with together(self.ranks):
                if self.terminal.lost:
                    raise self.terminal.lost
            return signal
        except NonFiniteError as error:
            with suppress(NonFiniteError, UserError):
                self._finish_save()
            last = f"last good checkpoint: {self.saved}" if self.saved else "no checkpoint yet"
            raise NonFiniteError(_more(error, f"; {last}")) from error
        finally:
            # Nothing writes to the folder after this, whatever ended the run.
            self._background.close()

    def _fit(self, stop: StopRequest) -> int | None:
        begun = self.step
        try:
            return self._steps(stop)
        except _DataError as error:
            # Every rank stopped before the next step.
            if self.step == begun:
                raise
            raise UserError(self._saved_after(error)) from error
        except DeviceError as error:
            if self.step == begun or self._is_saved() or not self._can_save_now():
                last = f"; last checkpoint: {self.saved}" if self.saved else ""
                raise UserError(_more(error, last)) from error
            raise UserError(self._saved_after(error, broken_off=True)) from error

    def _saved_after(self, error: UserError, *, broken_off: bool = False) -> str:
        """Saves the state after an error. Returns the error's message with the result of that."""
        self._reading()
        try:
            self._save(broken_off=broken_off)
        except UserError as second:
            raise UserError("\n".join(filter(None, map(str, (error, second))))) from second
        return _more(error, f"; saved in {self.saved}")

    def _is_saved(self) -> bool:
        return self.saved == checkpoint.folder_of(self.run_dir, self.step)

    def _can_save_now(self) -> bool:
        """True for a single process whose optimizer has not updated in this step."""
        return self.ranks.world == 1 and self.engine.steps_done() == self.step

    def _steps(self, stop: StopRequest) -> int | None:
        missing = self.ranks.is_main and not self._has_evaluation()
        if self._is_evaluation_step() and self.ranks.any(missing):
            # The evaluation of this step was broken off, or it failed.
            if not self._is_saved():
                with stop.save_in_progress():
                    self._save()
            if stopping := self._evaluate(stop):
                return stopping
        for batch in self._feed():
            self._advance(batch)
            stopping = self._stopping(stop)
            if self._is_log_step(self.step):
                self._report(self._reading())
            # Saved before the evaluation: a failed evaluation then costs no trained step.
            if self._is_save_step() or self._is_evaluation_step() or stopping:
                self._reading()
                with stop.save_in_progress():
                    self._save(goes_on=not stopping and self._goes_on())
            if self._is_evaluation_step() and not stopping:
                stopping = self._evaluate(stop)
            if stopping:
                return stopping
        return None

    def _feed(self) -> Iterator[Batch]:
        """The remaining batches. Each one is given when all ranks have theirs."""
        batches = self.pipeline.batches(self.step, self.plan.last_step)
        while True:
            with _data_errors(), together(self.ranks):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch

    # ----------------------------------------------------------------------------- one step

    def _advance(self, batch: Batch) -> None:
        """One update."""
        hyper = self.plan.hyper(self.step)
        draws = self.method.draws(self.spec, self.step)
        monitor = self._is_log_step(self.step + 1)
        fetched = self.engine.fetch(self.engine.train_step(batch, draws, hyper, monitor=monitor))
        if monitor and alike(batch):
            fetched = partial(_without_spread, fetched)
        self.step += 1
        self.meter.count()
        self.terminal.advance(self.step)
        previous = self._reading
        self._reading = cache(partial(self._read, self.step, fetched))
        # The metrics of a step are read after the next step is queued: the device stays busy.
        previous()

    def _read(self, step: int, fetched: Reading) -> dict[str, float]:
        values = fetched()
        bad = next((name for name, value in values.items() if not isfinite(value)), None)
        try:
            with together(self.ranks):
                if bad:
                    raise NonFiniteError(f"step {step}: {bad} is {values[bad]}")
        except NonFiniteError as error:
            # Reading the state may be a collective call: all ranks get here.
            state = ((name, slot.read()) for name, slot in self.engine.slots().items())
            bad_tensor = first_non_finite(state)
            tensor = f"; first bad tensor by now: {bad_tensor}" if bad_tensor else ""
            raise NonFiniteError(_more(error, tensor)) from error
        return values

    def _stopping(self, stop: StopRequest) -> int:
        """The signal for which all ranks stop now, or 0."""
        lost = SIGTERM if self.terminal.lost else 0
        return self.ranks.largest(stop.number or lost)

    # ------------------------------------------------------------------------- the intervals

    def _is_log_step(self, step: int) -> bool:
        return step == 1 or self._due(step, self.spec.log.every)

    def _is_save_step(self) -> bool:
        return self._due(self.step, self.spec.checkpoint.every)

    def _goes_on(self) -> bool:
        """Whether another step comes next."""
        return self.step < self.plan.last_step and not self._is_evaluation_step()

    def _is_evaluation_step(self) -> bool:
        every = self.spec.evaluate.every
        return self.step > 0 and every > 0 and self._due(self.step, every)

    def _due(self, step: int, every: int) -> bool:
        return step == self.plan.last_step or (every > 0 and step % every == 0)

    def _report(self, values: dict[str, float]) -> None:
        hyper = self.plan.hyper(self.step - 1)
        evaluating = self.meter.evaluation_share()
        speed, wait = self.meter.lap(self.pipeline.waited)
        before = self.health.state
        # The chance level moves with the targets. The methods with moving targets measure it.
        chance = values.get("chance", self.health.chance)
        row: Row = {
            "step": self.step,
            "epoch": self.step / self.plan.steps_per_epoch,
            "loss": values["loss"],
            "chance": chance,
            "state": self._observe(self.step, values, chance),
            "lr": hyper.lr,
            "weight_decay": hyper.weight_decay,
            "ema": hyper.ema,
            **values,
            "images_per_second": speed,
            "data_wait": wait,
        }
        if scale := self.engine.loss_scale:
            row |= {"loss_scale": scale.scale, "skipped_updates": scale.skipped}
        if evaluating:
            row["evaluate_share"] = evaluating
        skipped, warned = self._files.update()
        if self._files.skipped:
            row["skipped"] = len(self._files.skipped)
        if self._files.warned:
            row["image_warnings"] = len(self._files.warned)
        with together(self.ranks):
            self.logs.write(row)
        for name in skipped:
            self.terminal.line(f"damaged, skipped: {printable(name)}")
        for name, text in warned:
            self.terminal.warning(name, text)
        news = row["state"] != before or self.step in (1, self.plan.last_step)
        line = health_line(row, self.plan.total_steps, self.method.status(values))
        self.terminal.status(line, news=news)
        if advice := self.health.advice(self.step / self.plan.total_steps):
            self.terminal.line(advice)

    def _observe(self, step: int, values: Mapping[str, Any], chance: float) -> str:
        loss, spread = self.method.judged(values), self.method.spread(values)
        settled = step > self.method.settled(self.spec)
        return self.health.observe(loss, spread, chance=chance, settled=settled)

    def _evaluate(self, stop: StopRequest) -> int:
        """Returns the signal that broke the evaluation off, or 0.

        A resumed run repeats an evaluation that was broken off.
        """

        def check() -> None:
            if stop.number or self.terminal.lost:
                raise Stopped

        with self.meter.evaluation():
            try:
                with whole(self.ranks):
                    rows = self.evaluate(self.step, check)
            except Stopped:
                return self._stopping(stop)
            except UserError as error:
                raise UserError(_more(error, f"; the state is saved in {self.saved}")) from error
            self._tell(rows)
        return 0

    def _tell(self, rows: Sequence[Evaluation]) -> None:
        """Logs and prints the rows of an evaluation."""
        with together(self.ranks):
            # All rows at once: a resumed run does not repeat an evaluation that has one row.
            self.logs.write(*(row.as_json() for row in rows))
        for row in rows:
            self.terminal.line(row.line())
            if advice := self._judge(row):
                self.terminal.line(advice)

    def _judge(self, row: Evaluation) -> str | None:
        """Advice on the result of an evaluation, if there is any."""
        if row.score is None or not row.main:
            return None
        return self.health.evaluated(row.title, row.score)

    def _has_evaluation(self) -> bool:
        """Whether the log has an evaluation of this step."""
        return any("eval" in row and row["step"] == self.step for row in self.logs.kept)

    def _save(self, *, broken_off: bool = False, goes_on: bool = False) -> None:
        """Writes a checkpoint.

        Args:
            broken_off: whether the next step was begun. Running statistics and teacher then include
                its batch, and a resume warns.
            goes_on: whether training goes on after this step, so that the checkpoint may be written
                in the background.
        """
        background = self.spec.checkpoint.background and goes_on
        with self.meter.pause():
            self._finish_save()
            streamed = Streamed(self.engine, self._types)
            stamp = {
                **self.stamp,
                "seconds": self.meter.seconds,
                "evaluate_seconds": self.meter.evaluating,
                "foreign": self.foreign,
                "broken_off": broken_off,
            }
            path, keep = checkpoint.folder_of(self.run_dir, self.step), self.spec.checkpoint.keep
            write = partial(checkpoint.write, spec=self.spec, extra=stamp, keep=keep)
            state: Mapping[str, Any] = {}
            with together(self.ranks), streamed.by_all():
                if self.ranks.is_main:
                    state = streamed.tensors()
                if background:
                    state = {name: tensor.bits() for name, tensor in state.items()}
                elif self.ranks.is_main:
                    write(self.run_dir, self.step, state)
            if background:
                self._background.begin(path, partial(write, self.run_dir, self.step, state))
            else:
                self.saved = path

    def _finish_save(self) -> None:
        """Waits for the checkpoint in the background, if there is one."""
        self.saved = self._background.finish() or self.saved


def _more(error: Exception, text: str) -> str:
    """An error's message with a further text. It stays empty if another rank has the message."""
    return f"{error}{text}" if str(error) else ""


def _without_spread(fetched: Reading) -> dict[str, float]:
    """Metrics of a step on equal images: the features have no spread."""
    return {**fetched(), "feature_std": 0.0}
