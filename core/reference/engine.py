"""``core.engine.Engine`` in NumPy. One can read the whole training step in one sitting."""

from collections.abc import Callable, Iterator, Mapping

import numpy as np
from autograd import value_and_grad
from autograd.tracer import getval

from triptych.core import engine as core
from triptych.core import parameters
from triptych.core.config.spec import RunSpec
from triptych.core.contracts import (
    ALONE,
    Array,
    Context,
    Outcome,
    Ranks,
    Slot,
    State,
    Tensor,
)
from triptych.core.optim import groups
from triptych.core.reference import ops
from triptych.core.reference.model import METHODS, Pair
from triptych.core.reference.optim import Optimizer


class Engine(core.Engine):
    """A run in float64 on the host."""

    model: Pair
    optimizer: Optimizer

    def __init__(self, spec: RunSpec, state: Mapping[str, Array], ranks: Ranks = ALONE) -> None:
        super().__init__(spec, ops, Context("cpu", "float64", runs_ahead=ranks.world > 1), ranks)
        table = parameters.table(spec)
        values = {p.name: self.tensor(state[p.name]) for p in table}
        self.model = METHODS[spec.method.name](spec, values, ranks)
        self.trainable = [p.name for p in table if p.trainable]
        self.grads: State = {}
        members = groups.assign({name: values[name] for name in self.trainable}, spec)
        self.optimizer = Optimizer(spec.optim, self.model.values, lambda: self.grads, members)

    def tensor(self, array: Array) -> Tensor:
        """See ``core.engine.Engine``."""
        return np.array(array, np.float64 if np.issubdtype(array.dtype, np.floating) else None)

    def array(self, tensor: Tensor) -> Array:
        """See ``core.engine.Engine``."""
        return np.array(getval(tensor))

    def clear_gradients(self) -> None:
        """See ``core.engine.Engine``."""
        self.grads = {}

    def differentiate(
        self, compute: Callable[..., Outcome], /, *inputs: Tensor
    ) -> tuple[Outcome, list[Tensor]]:
        """See ``core.engine.Engine``."""
        values = self.model.values
        outcomes: list[Outcome] = []

        def loss(trainable: dict[str, Tensor], leaves: list[Tensor]) -> Tensor:
            values.update(trainable)
            outcomes.append(compute(*leaves))
            return outcomes[-1].loss

        start = {name: values[name] for name in self.trainable}
        _, (grads, at_inputs) = value_and_grad(loss, (0, 1))(start, list(inputs))
        values.update(start)
        self.grads = {name: grads[name] + self.grads.get(name, 0.0) for name in grads}
        outcome = outcomes[-1]
        return Outcome(
            getval(outcome.loss),
            {name: getval(value) for name, value in outcome.metrics.items()},
            {name: getval(value) for name, value in outcome.features.items()},
        ), at_inputs

    def sum_gradients(self) -> None:
        """See ``core.engine.Engine``."""
        for name in self.trainable:
            gradient = self.grads.get(name, np.zeros_like(self.model.values[name]))
            self.grads[name] = self.replicas.sum(gradient)

    def gradients(self) -> Iterator[tuple[str, Callable[[], Array]]]:
        """See ``core.engine.Engine``."""
        for name, gradient in self.grads.items():
            yield name, gradient.copy

    def gradient_norm(self) -> Tensor:
        """See ``core.engine.Engine``."""
        return np.sqrt(sum(np.sum(g * g) for g in self.grads.values()))

    def model_slots(self) -> dict[str, Slot]:
        """See ``core.engine.Engine``."""
        return {name: self._slot(self.model.values, name) for name in self.model.values}

    def moment_slots(self) -> dict[str, Slot]:
        """See ``core.engine.Engine``."""
        return {name: self._slot(self.optimizer.moments, name) for name in self.optimizer.moments}

    def _slot(self, values: dict[str, Tensor], name: str) -> Slot:
        return Slot(
            values[name].shape,
            lambda: np.array(values[name]),
            lambda a: values.__setitem__(name, self.tensor(a)),
        )
