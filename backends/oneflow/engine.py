"""Implements ``core.engine.Engine`` in OneFlow."""

from collections.abc import Callable, Iterator, Mapping

import numpy as np
import oneflow as flow
from oneflow import Tensor

from triptych.backends.oneflow import ops, parallel, sharded
from triptych.backends.oneflow.methods import METHODS, Pair
from triptych.backends.oneflow.optim import OPTIMIZERS, Optimizer
from triptych.backends.oneflow.owned import Owned
from triptych.backends.oneflow.state import NUMPY, to_array
from triptych.backends.oneflow.vit import VisionTransformer
from triptych.core import engine as core
from triptych.core.config.spec import RunSpec
from triptych.core.contracts import ALONE, Array, Outcome, Ranks, Slot
from triptych.core.optim import groups
from triptych.core.parallel.sharding import splits


class Engine(core.Engine):
    """The engine of one run. Its tensors are float32, or float64 if that is the precision."""

    model: Pair
    optimizer: Optimizer
    # OneFlow has no public name for the base class of its exceptions.
    failures = (RuntimeError, flow._oneflow_internal.exception.Exception)

    def __init__(
        self, spec: RunSpec, state: Mapping[str, Array], device: str, ranks: Ranks = ALONE
    ) -> None:
        super().__init__(spec, ops, parallel.context(device, spec.precision, ranks), ranks)
        self.dtype = flow.float64 if spec.precision == "float64" else flow.float32
        self.layout = sharded.Layout(splits(spec), ranks.tensor)
        model = METHODS[spec.method.name](spec, ranks)
        sharded.divide(model, *self.layout)
        self.model = model.to(device).to(self.dtype).train()
        for module in self.model.modules():
            if isinstance(module, VisionTransformer):
                module.recompute = spec.parallel.recompute
        values, packed = model.pack(spec)
        self.load_model(state)
        named = dict(model.named_parameters())
        trainable = {name: named[name] for name in packed}
        members = groups.assign(trainable, spec)
        shared = spec.parallel.shard_optimizer
        self.owned = Owned(values, ranks.replicas) if shared else None
        norms = sharded.Norms(self.layout.table, ranks, *([ranks.replicas] if shared else []))
        rule = OPTIMIZERS[spec.optim.name]
        self.optimizer = rule(trainable, values, spec.optim, members, norms, self.owned)

    def tensor(self, array: Array) -> Tensor:
        """See ``core.engine.Engine``."""
        floating = np.issubdtype(array.dtype, np.floating)
        # A copy: OneFlow would share the memory, and still read it while the caller refills it.
        copy = np.array(array, NUMPY[self.dtype] if floating else array.dtype, order="C")
        return flow.from_numpy(copy).to(self.context.device)

    def array(self, tensor: Tensor) -> Array:
        """See ``core.engine.Engine``."""
        return to_array(tensor)

    def clear_gradients(self) -> None:
        """See ``core.engine.Engine``."""
        self.optimizer.zero_grad()

    def differentiate(
        self, compute: Callable[..., Outcome], /, *inputs: Tensor
    ) -> tuple[Outcome, list[Tensor | None]]:
        """See ``core.engine.Engine``."""
        leaves = [x.detach().requires_grad_() for x in inputs]
        outcome = compute(*leaves)
        outcome.loss.backward()
        return outcome, [leaf.grad for leaf in leaves]

    def sum_gradients(self) -> None:
        """See ``core.engine.Engine``."""
        self.optimizer.sum_gradients(self.replicas)

    def gradients(self) -> Iterator[tuple[str, Callable[[], Array]]]:
        """See ``core.engine.Engine``."""
        if self.owned:
            pieces = self.optimizer.owned_gradients(self.owned)
            slots = self.layout.owned_slots(pieces, self.owned)
        else:
            slots = self.layout.slots(self.optimizer.gradients)
        for name, _ in self.model.named_parameters():
            if name in slots:
                yield name, slots[name].read

    def gradient_norm(self) -> Tensor:
        """See ``core.engine.Engine``."""
        return self.optimizer.gradient_norm()

    def model_slots(self) -> dict[str, Slot]:
        """See ``core.engine.Engine``."""
        return self.layout.slots(self.model.state_dict())

    def moment_slots(self) -> dict[str, Slot]:
        """See ``core.engine.Engine``."""
        if self.owned:
            return self.layout.owned_slots(self.optimizer.owned_moments(self.owned), self.owned)
        return self.layout.slots(self.optimizer.moments())
