"""``core.engine.Engine`` in OneFlow."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import oneflow as flow
from oneflow import Tensor

from triptych.backends.oneflow import ops, parallel
from triptych.backends.oneflow.methods import METHODS
from triptych.backends.oneflow.optim import OPTIMIZERS
from triptych.backends.oneflow.state import NUMPY, model_slots, slots, tensor_slot, to_array
from triptych.core import engine as core
from triptych.core import methods
from triptych.core.config.spec import RunSpec
from triptych.core.contracts import Array, Slot


class Engine(core.Engine):
    """One run. The state's tensors are float32, or float64 where that is the precision."""

    def __init__(self, spec: RunSpec, state: Mapping[str, Array], device: str) -> None:
        self.spec, self.ops = spec, ops
        self.method = methods.METHODS[spec.method.name]
        self.context = parallel.context(device, spec.precision)
        self.dtype = flow.float64 if spec.precision == "float64" else flow.float32
        model = METHODS[spec.method.name](spec).to(device).to(self.dtype)
        self.model = model.train()
        values, packed = model.pack(spec.optim)
        for name, slot in model_slots(model).items():
            slot.write(state[name])
        named = dict(model.named_parameters())
        trainable = {name: named[name] for name in packed}
        self.optimizer = OPTIMIZERS[spec.optim.name](trainable, values, spec.optim)

    def tensor(self, array: Array) -> Tensor:
        """See ``core.engine.Engine``."""
        floating = np.issubdtype(array.dtype, np.floating)
        # A copy: OneFlow would share the memory, and work on while the caller refills it.
        own = np.array(array, NUMPY[self.dtype] if floating else array.dtype, order="C")
        return flow.from_numpy(own).to(self.context.device)

    def array(self, tensor: Tensor) -> Array:
        """See ``core.engine.Engine``."""
        return to_array(tensor)

    def backward(self, loss: Tensor) -> None:
        """See ``core.engine.Engine``."""
        self.optimizer.zero_grad()
        loss.backward()

    def gradients(self) -> Iterator[tuple[str, Callable[[], Array]]]:
        """See ``core.engine.Engine``."""
        gradients = self.optimizer.gradients
        for name, _ in self.model.named_parameters():
            if name in gradients:
                yield name, tensor_slot(gradients[name]).read

    def gradient_norm(self) -> Tensor:
        """See ``core.engine.Engine``."""
        return self.optimizer.gradient_norm()

    def slots(self) -> Mapping[str, Slot]:
        """See ``core.engine.Engine``."""
        return slots(self.model, self.optimizer)

    @flow.no_grad()
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
        module = getattr(self.model, branch).eval()
        found = module.encoder.tokens(self.tensor(images), layers)
        pick = {"cls": lambda x: x[:, 0], "mean": lambda x: x[:, 1:].mean(1), "all": lambda x: x}
        features = {name: pick[tokens](x) for name, x in found.items()}
        if projection:
            features["projection"] = module.projector(found["final"][:, 0])
        module.train()
        return {name: self.array(x) for name, x in features.items()}
