"""The hyper-parameters of every step of a run, derived from its spec."""

from dataclasses import dataclass

from triptych.core.config.spec import FinetuneSpec, RunSpec
from triptych.core.contracts import Hyper
from triptych.core.errors import UserError
from triptych.core.optim import schedules


@dataclass(frozen=True)
class Plan:
    """The schedules of one run.

    Attributes:
        spec: of the run.
        steps_per_epoch: number of full batches in one pass over the data.
    """

    spec: RunSpec
    steps_per_epoch: int

    def __post_init__(self) -> None:
        """Raises UserError if the warm-up is longer than the run."""
        if self.warmup > self.total:
            raise UserError(
                f"optim: a warm-up of {self.warmup:g} {self.unit} is longer than the run of "
                f"{self.total:g} {self.unit}; shorten it or train longer"
            )

    @property
    def total_steps(self) -> int:
        """Length of the schedules in steps. ``train.stop_at`` does not change it."""
        train = self.spec.train
        return train.steps if train.steps else (train.epochs or 0) * self.steps_per_epoch

    @property
    def last_step(self) -> int:
        """Step at which this run ends."""
        return min(self.total_steps, self.spec.train.stop_at or self.total_steps)

    @property
    def unit(self) -> str:
        """Unit in which the schedules advance."""
        return "epochs" if self.spec.train.epochs else "steps"

    @property
    def total(self) -> float:
        """Length of the schedules in ``unit``."""
        return float(self.spec.train.epochs or self.total_steps)

    @property
    def warmup(self) -> float:
        """Length of the warm-up in ``unit``."""
        optim = self.spec.optim
        if optim.warmup_epochs is not None:
            steps = self.steps_per_epoch if self.unit == "steps" else 1
            return float(optim.warmup_epochs * steps)
        steps = optim.warmup_steps or 0
        return steps / self.steps_per_epoch if self.unit == "epochs" else float(steps)

    @property
    def _top(self) -> float:
        """Position in ``unit`` at which the warm-up reaches the peak learning rate."""
        if not self.spec.optim.warmup_reaches_peak:
            return self.warmup
        steps = self.steps_per_epoch if self.spec.optim.per == "epoch" else 1
        return self.warmup - (steps / self.steps_per_epoch if self.unit == "epochs" else steps)

    @property
    def peak_lr(self) -> float:
        """Learning rate at the end of the warm-up."""
        optim = self.spec.optim
        return schedules.scaled_lr(optim.lr, self.spec.train.batch_size, optim.scale_lr_by)

    def position(self, step: int) -> float:
        """Progress before ``step`` (from 0) in ``unit``: fractional epochs, or steps."""
        if self.unit == "steps":
            return float(step)
        epoch, iteration = divmod(step, self.steps_per_epoch)
        # As in the official code: epoch + i / iterations, not step / iterations.
        return epoch + iteration / self.steps_per_epoch

    def hyper(self, step: int) -> Hyper:
        """The scalars of ``step`` (from 0)."""
        optim = self.spec.optim
        coarse = self._coarse(step)
        weight_decay = optim.weight_decay
        if optim.weight_decay_end is not None:
            weight_decay = schedules.cosine(
                weight_decay, optim.weight_decay_end, coarse / self.total
            )
        lr = self._lr(self._coarse(step, optim.lag_epochs))
        return Hyper(step=step, lr=lr, weight_decay=weight_decay, ema=self._ema(step))

    def _ema(self, step: int) -> float:
        """The teacher's momentum; 0 without a teacher."""
        method = self.spec.method
        if method.momentum is None:
            return 0.0
        if isinstance(method, FinetuneSpec) and method.ema_rule == "mmengine" and step == 0:
            return 0.0  # the first update copies
        if method.momentum_schedule == "cosine":
            return schedules.ema_momentum(method.momentum, self.total, self.position(step))
        return method.momentum

    def _coarse(self, step: int, lag: int = 0) -> float:
        """Progress in ``unit`` at the schedules' last advance, ``lag`` whole epochs earlier."""
        if self.spec.optim.per == "step":
            return self.position(step)
        epoch = max(step // self.steps_per_epoch - lag, 0)
        return float(epoch if self.unit == "epochs" else epoch * self.steps_per_epoch)

    @property
    def _lr_total(self) -> float:
        """Length of the learning rate's cosine in ``unit``. It may exceed the run."""
        return float(int(self.total * self.spec.optim.lr_epochs_mul))

    def _lr(self, position: float) -> float:
        optim, peak = self.spec.optim, self.peak_lr
        if optim.schedule == "cosine":
            total = self.total if optim.lr_epochs_mul == 1.0 else self._lr_total
            return schedules.warmup_cosine(
                peak,
                optim.end_lr,
                self.warmup,
                total,
                position,
                start=optim.warmup_start_lr,
                top=self._top,
                begin=None if optim.warmup_shifts_cosine else 0.0,
            )
        if position < self.warmup:
            return schedules.line(optim.warmup_start_lr, peak, self._top, position)
        if optim.schedule == "multistep":
            return schedules.multistep(peak, optim.milestones, optim.factor, position)
        return peak
