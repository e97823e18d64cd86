"""``core.engine.Engine`` in NumPy: a whole training run, readable in one sitting."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from autograd import value_and_grad
from autograd.tracer import getval

from triptych.core import engine as core
from triptych.core import methods, parameters
from triptych.core.config.spec import MocaSpec, RunSpec
from triptych.core.contracts import Array, Batch, Context, Hyper, Outcome, Slot, State, Tensor
from triptych.core.reference import ops
from triptych.core.reference.encoders import encode
from triptych.core.reference.layers import EVALUATION
from triptych.core.reference.model import MocaModel, Model
from triptych.core.reference.optim import Optimizer


class Engine(core.Engine):
    """One run in float64 on the host."""

    def __init__(self, spec: RunSpec, state: Mapping[str, Array]) -> None:
        self.spec, self.ops = spec, ops
        self.method = methods.METHODS[spec.method.name]
        self.context = Context("cpu", "float64", runs_ahead=False)
        table = parameters.table(spec)
        model = MocaModel if isinstance(spec.method, MocaSpec) else Model
        self.model = model(spec, {p.name: self.tensor(state[p.name]) for p in table})
        self.trainable = [p.name for p in table if p.trainable]
        self.grads: State = {}
        self.optimizer = Optimizer(
            spec.optim, self.model.values, lambda: self.grads, self.trainable
        )

    def tensor(self, array: Array) -> Tensor:
        """See ``core.engine.Engine``."""
        return np.array(array, np.float64 if np.issubdtype(array.dtype, np.floating) else None)

    def array(self, tensor: Tensor) -> Array:
        """See ``core.engine.Engine``."""
        return np.array(getval(tensor))

    def backward(self, loss: Tensor) -> None:
        """Done with the forward pass, in ``_differentiate``."""

    def gradients(self) -> Iterator[tuple[str, Callable[[], Array]]]:
        """See ``core.engine.Engine``."""
        for name, gradient in self.grads.items():
            yield name, gradient.copy

    def gradient_norm(self) -> Tensor:
        """See ``core.engine.Engine``."""
        return np.sqrt(sum(np.sum(g * g) for g in self.grads.values()))

    def slots(self) -> Mapping[str, Slot]:
        """See ``core.engine.Engine``."""
        found = {name: self._slot(self.model.values, name) for name in self.model.values}
        moments = self.optimizer.moments
        found.update({name: self._slot(moments, name) for name in moments})
        found["optimizer.step"] = Slot(
            (),
            lambda: np.array(self.optimizer.count),
            lambda a: setattr(self.optimizer, "count", int(a)),
        )
        return found

    def _slot(self, values: dict[str, Tensor], name: str) -> Slot:
        return Slot(
            values[name].shape,
            lambda: np.array(values[name]),
            lambda a: values.__setitem__(name, self.tensor(a)),
        )

    def embed(
        self,
        images: Array,
        *,
        branch: str = "student",
        layers: Sequence[int] = (),
        tokens: str = "cls",
        projection: bool = False,
    ) -> dict[str, Array]:
        """See ``core.engine.Engine``."""
        if projection:
            self.require_projector()
        x = self.tensor(images)
        values, model = self.model.values, self.spec.model
        found = encode(values, f"{branch}.encoder", x, model, EVALUATION)
        wanted = {name: found[name] for name in ("final", *(f"layer{i}" for i in layers))}
        pick = {"cls": lambda t: t[:, 0], "mean": lambda t: t[:, 1:].mean(1), "all": lambda t: t}
        features = {name: pick[tokens](value) for name, value in wanted.items()}
        if projection:
            features["projection"] = self.model.branch(branch, x, EVALUATION)
        return features

    def _differentiate(self, batch: Batch, draws: Mapping[str, Array], hyper: Hyper) -> Outcome:
        values = self.model.values
        views = tuple(self.tensor(view) for view in batch.views)
        outcomes: list[Outcome] = []

        def loss(trainable: dict[str, Tensor]) -> Tensor:
            values.update(trainable)
            method = self.spec.method
            outcomes.append(self.method.forward(self.ops, self.model, views, draws, hyper, method))
            return outcomes[-1].loss

        start = {name: values[name] for name in self.trainable}
        _, self.grads = value_and_grad(loss)(start)
        values.update(start)
        done = outcomes[-1]
        return Outcome(
            getval(done.loss),
            {name: getval(value) for name, value in done.metrics.items()},
            {name: getval(value) for name, value in done.features.items()},
            {name: getval(value) for name, value in done.kept.items()},
        )
