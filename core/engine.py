"""The contract between the shared parts and a backend.

A backend is a deterministic function: (state, batch, draws, hyper) -> (new state, metrics).
``Engine`` holds the order of one step, which is the same on every framework. A backend adds the
tensor parts: a model, an optimizer, and the conversions between arrays and tensors.

Shape letters:
    N: images per batch.
    C: channels.
    H: height.
    W: width.
    D: feature width.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from triptych.core.config.spec import RunSpec
from triptych.core.contracts import (
    ALONE,
    Array,
    Batch,
    Context,
    Courier,
    Hyper,
    Method,
    Ops,
    Optimizer,
    Outcome,
    Ranks,
    Slot,
    State,
    Step,
    Tensor,
)
from triptych.core.errors import NonFiniteError
from triptych.core.inference import Inference
from triptych.core.methods import METHODS, staging
from triptych.core.methods.accumulate import Accumulation
from triptych.core.methods.health import feature_std, first_non_finite
from triptych.core.optim.scaling import LossScale


class Engine(Inference):
    """One run on one backend. Subclasses build ``model`` and ``optimizer``."""

    optimizer: Optimizer
    courier: Courier | None = None
    """Takes the batches to the device, if that does not share the memory of the host."""

    def __init__(self, spec: RunSpec, ops: Ops, context: Context, ranks: Ranks = ALONE) -> None:
        super().__init__(spec, ops, context, ranks)
        self.method: Method[Any, Any] = METHODS[spec.method.name]
        self.replicas = ranks.replicas
        self.loss_scale = LossScale() if spec.precision == "float16" else None
        self._finite = True

    # ------------------------------------------------------------------ the tensor parts: native

    @abstractmethod
    def clear_gradients(self) -> None:
        """Sets the gradients of all trainable parameters to 0."""

    @abstractmethod
    def differentiate(
        self, compute: Callable[..., Outcome], /, *inputs: Tensor
    ) -> tuple[Outcome, list[Tensor]]:
        """See ``core.methods.accumulate.Autograd``."""

    def differentiate_all(self, computes: Sequence[Callable[[], Outcome]], /) -> list[Outcome]:
        """See ``core.methods.accumulate.Autograd``. A pipeline overlaps the losses."""
        if self.stage is None or self.spec.method.name == "linear":  # its encoder has no gradient
            return [self.differentiate(compute)[0] for compute in computes]
        return self.stage.differentiate(computes)

    @abstractmethod
    def sum_gradients(self) -> None:
        """Replaces all gradients by their sums over ``replicas``; a missing one counts as zeros.

        The engine calls it once in a step, and only if there are several copies.
        """

    @abstractmethod
    def gradients(self) -> Iterable[tuple[str, Callable[[], Array]]]:
        """(canonical name, reader of the gradient) of each trainable parameter in forward order."""

    @abstractmethod
    def gradient_norm(self) -> Tensor:
        """Global L2 norm of all gradients, before clipping; stays on the device."""

    def divide_gradients(self, divisor: float) -> None:
        """Divides all gradients. Only a backend that has float16 is asked to."""
        raise NotImplementedError

    @abstractmethod
    def model_slots(self) -> Mapping[str, Slot]:
        """Every tensor of student, teacher and memory by canonical name, buffers included."""

    @abstractmethod
    def moment_slots(self) -> Mapping[str, Slot]:
        """Every tensor of the optimizer's state, by canonical name."""

    def close(self) -> None:
        """Releases the resources of the framework."""

    # ------------------------------------------------------------- the order of one step: shared

    def train_step(
        self, batch: Batch, draws: Mapping[str, Array], hyper: Hyper, *, monitor: bool = False
    ) -> dict[str, Tensor]:
        """One optimizer step; returns scalars that stay on the device until ``read``.

        Args:
            monitor: also measure the gradient norm and return the features, for the health line.

        Raises:
            NonFiniteError: the loss is not finite; the update has not been applied. If the
                context ``runs_ahead`` this is not raised: ``read`` gives the value later, and the
                caller checks it.
            DeviceError: see ``core.machine.failures``. Statistics and teacher may have changed.
        """
        outcome = self._differentiate(batch, draws, hyper, monitored=monitor)
        metrics = {"loss": outcome.loss, **outcome.metrics}
        if monitor:
            if self._finite:
                metrics["gradient_norm"] = self.gradient_norm()
            metrics.update({f"feature/{k}": v for k, v in outcome.features.items()})
        if not self.context.runs_ahead and not np.isfinite(self.array(outcome.loss)):
            raise NonFiniteError(self._first_bad(batch, outcome, hyper))
        self._update(outcome, hyper)
        return metrics

    def loss_and_grads(
        self, batch: Batch, draws: Mapping[str, Array], hyper: Hyper
    ) -> tuple[dict[str, Array], State]:
        """For parity: (metrics and features, gradients by canonical name), without an update.

        The teacher's EMA and the running statistics change, since they belong to the forward pass.
        """
        return self._record(self._differentiate(batch, draws, hyper))

    def trace_step(
        self, batch: Batch, draws: Mapping[str, Array], hyper: Hyper
    ) -> tuple[dict[str, Array], State]:
        """``loss_and_grads`` followed by the update, as ``tools/parity.py trace`` records it."""
        outcome = self._differentiate(batch, draws, hyper)
        record = self._record(outcome)
        self._update(outcome, hyper)
        return record

    def read(self, metrics: Mapping[str, Tensor]) -> dict[str, float]:
        """Metrics as Python floats. Waits for the device. Features become their spread."""
        values: dict[str, float] = {}
        spreads = []
        for name, value in metrics.items():
            if name.startswith("feature/"):
                spreads.append(feature_std(self.array(value)))
            else:
                values[name] = float(self.array(value))
        if spreads:
            values["feature_std"] = min(spreads)
        return values

    def fetch(self, metrics: Mapping[str, Tensor]) -> Callable[[], dict[str, float]]:
        """Starts to copy metrics to the host. The result waits and returns what ``read`` does."""
        if self.courier is None:
            return partial(self.read, metrics)
        arrived = self.courier.bring(metrics)
        return lambda: self.read(arrived())

    def slots(self) -> dict[str, Slot]:
        """The whole state by canonical name: student, teacher, memory, optimizer."""
        return {
            **self.model_slots(),
            **self.model.counters(),
            **self.moment_slots(),
            "optimizer.step": Slot.counter(self.optimizer, "count"),
            **(self.loss_scale.slots() if self.loss_scale else {}),
        }

    def steps_done(self) -> int:
        """Number of steps whose update is done, or was left out in float16."""
        return self.optimizer.count + (self.loss_scale.skipped if self.loss_scale else 0)

    def load_model(self, state: Mapping[str, Array]) -> None:
        """Sets student, teacher and memory from the tensors of ``core.parameters.table``."""
        for name, slot in {**self.model_slots(), **self.model.counters()}.items():
            slot.write(state[name])

    def export_state(self) -> State:
        """The whole state, canonical and complete (collective)."""
        return {name: slot.read() for name, slot in self.slots().items()}

    def import_state(self, state: Mapping[str, Array]) -> None:
        """Sets the whole state.

        Raises:
            ValueError: names or shapes differ from those of ``export_state``; nothing is changed.
        """
        slots = self.slots()
        shapes = {name: slot.shape for name, slot in slots.items()}
        problems = [f"missing {n} {shapes[n]}" for n in shapes if n not in state]
        problems += [f"unused {n} {state[n].shape}" for n in state if n not in shapes]
        problems += [
            f"{n}: expected {shapes[n]}, got {state[n].shape}"
            for n in shapes
            if n in state and tuple(state[n].shape) != tuple(shapes[n])
        ]
        if problems:
            raise ValueError("\n".join(problems))
        for name, slot in slots.items():
            slot.write(state[name])

    def _differentiate(
        self, batch: Batch, draws: Mapping[str, Array], hyper: Hyper, *, monitored: bool = True
    ) -> Outcome:
        """The loss and the gradients of a step, computed in ``train.accumulate`` parts.

        Args:
            monitored: whether to return features, even if copies of the model have parts of them,
                and metrics that cost time.
        """
        section = self.spec.method
        step = Step(self.ops, self.model, section, draws, hyper, self.replicas, monitored)
        with self._device_failures():
            batch = self.method.prepare(batch, draws, section)
            self.clear_gradients()
            batch, parts = self._staged(step, batch)
            features = monitored or self.replicas.count == 1  # to gather them takes time
            scale = self.loss_scale.scale if self.loss_scale else 1
            whole = Accumulation(self, self.method, step, batch, parts, features, scale)
            outcome = whole.differentiate()
            if self.replicas.count > 1:
                self.sum_gradients()
            if self.loss_scale:
                self.divide_gradients(scale)
                self._finite = bool(np.isfinite(self.array(self.gradient_norm())))
            return outcome if self.stage is None else outcome.changed(self._arrived)

    def _staged(self, step: Step[Any, Any], batch: Batch) -> tuple[Batch, list[Batch]]:
        """The batch with its places, and its micro-batches, on the device."""
        count = self.spec.train.accumulate * self.spec.parallel.micro_batches
        whole, parts = staging.placed(self.method, step, batch, staging.divided(batch, count))
        return staging.on_device(self.ops, whole, parts, self.tensor, self.courier)

    def _record(self, outcome: Outcome) -> tuple[dict[str, Array], State]:
        """(metrics and features, gradients), by name."""
        values = {"loss": outcome.loss, **outcome.metrics}
        values.update({f"feature/{k}": v for k, v in outcome.features.items()})
        return (
            {name: self.array(value) for name, value in values.items()},
            {name: read() for name, read in self.gradients()},
        )

    def _update(self, outcome: Outcome, hyper: Hyper) -> None:
        with self._device_failures():
            if self._finite:
                self.optimizer.step(hyper)
            if self.loss_scale:
                self.loss_scale.update(finite=self._finite)
            with self.ops.no_grad():
                self.method.finish(self.model, outcome, hyper)

    def _first_bad(self, batch: Batch, outcome: Outcome, hyper: Hyper) -> str:
        """Names the first non-finite tensor in the order of the computation."""

        def candidates() -> Iterable[tuple[str, Array]]:
            yield from ((f"batch view{i + 1}", v) for i, v in enumerate(batch.views))
            yield from ((name, slot.read()) for name, slot in self.slots().items())
            yield from ((f"feature {n}", self.array(v)) for n, v in outcome.features.items())
            yield "loss", self.array(outcome.loss)

        tensor = first_non_finite(candidates())
        return f"step {hyper.step + 1}: the loss is not finite; first bad tensor: {tensor}"
