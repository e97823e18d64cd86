"""Implements ``core.engine.Engine`` in OneFlow."""

from collections.abc import Callable, Iterator, Mapping

import numpy as np
import oneflow as flow
from oneflow import Tensor

from triptych.backends.oneflow import ops, parallel, sharded
from triptych.backends.oneflow.methods import METHODS, Pair
from triptych.backends.oneflow.optim import OPTIMIZERS, Optimizer
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
        self.splits = splits(spec)
        model = METHODS[spec.method.name](spec, ranks)
        sharded.divide(model, self.splits, ranks.tensor)
        self.model = model.to(device).to(self.dtype).train()
        for module in self.model.modules():
            if isinstance(module, VisionTransformer):
                module.recompute = spec.parallel.recompute
        values, packed = model.pack(spec)
        self.load_model(state)
        named = dict(model.named_parameters())
        trainable = {name: named[name] for name in packed}
        members = groups.assign(trainable, spec)
        norms = sharded.Norms(self.splits, ranks)
        self.optimizer = OPTIMIZERS[spec.optim.name](trainable, values, spec.optim, members, norms)

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
        gradients = self.optimizer.gradients
        for name, _ in self.model.named_parameters():
            if name in gradients:
                yield name, self._slots({name: gradients[name]})[name].read

    def gradient_norm(self) -> Tensor:
        """See ``core.engine.Engine``."""
        return self.optimizer.gradient_norm()

    def model_slots(self) -> dict[str, Slot]:
        """See ``core.engine.Engine``."""
        return self._slots(self.model.state_dict())

    def moment_slots(self) -> dict[str, Slot]:
        """See ``core.engine.Engine``."""
        return self._slots(self.optimizer.moments())

    def _slots(self, named: Mapping[str, Tensor]) -> dict[str, Slot]:
        return sharded.whole_slots(named, self.splits, self.ranks.tensor)
