"""``core.engine.Engine`` in OneFlow."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import oneflow as flow
from oneflow import Tensor

from triptych.backends.oneflow import convert, ops, parallel
from triptych.backends.oneflow.methods import METHODS
from triptych.backends.oneflow.optim import OPTIMIZERS
from triptych.core import algorithms
from triptych.core import engine as core
from triptych.core.config.spec import RunSpec
from triptych.core.engine import Array, Slot


class Engine(core.Engine):
    """One run. The state's tensors are float32, or float64 where that is the precision."""

    def __init__(self, spec: RunSpec, state: Mapping[str, Array], device: str) -> None:
        self.spec, self.ops = spec, ops
        self.method = algorithms.METHODS[spec.method.name]
        self.context = parallel.context(device, spec.precision)
        self.dtype = flow.float64 if spec.precision == "float64" else flow.float32
        model = METHODS[spec.method.name](spec).to(device).to(self.dtype)
        self.model = model.train()
        values = model.pack()
        for name, tensor in model.state_dict().items():
            convert.from_array(tensor, state[name])
        trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.optimizer = OPTIMIZERS[spec.optim.name](trainable, values, spec.optim)

    def tensor(self, array: Array) -> Tensor:
        """See ``core.engine.Engine``."""
        dtype = self.dtype if np.issubdtype(array.dtype, np.floating) else flow.int64
        return convert.to_tensor(array, dtype).to(self.context.device)

    def array(self, tensor: Tensor) -> Array:
        """See ``core.engine.Engine``."""
        return convert.to_array(tensor)

    def backward(self, loss: Tensor) -> None:
        """See ``core.engine.Engine``."""
        self.optimizer.zero_grad()
        loss.backward()

    def gradients(self) -> Iterator[tuple[str, Callable[[], Array]]]:
        """See ``core.engine.Engine``."""
        for name, gradient in self.optimizer.gradients.items():
            yield name, convert.tensor_slot(gradient).read

    def gradient_norm(self) -> Tensor:
        """See ``core.engine.Engine``."""
        return self.optimizer.gradient_norm()

    def slots(self) -> Mapping[str, Slot]:
        """See ``core.engine.Engine``."""
        return convert.slots(self.model, self.optimizer)

    @flow.no_grad()
    def embed(
        self,
        images: Array,
        *,
        branch: str = "student",
        layers: Sequence[int] = (),
        tokens: str = "cls",
    ) -> dict[str, Array]:
        """See ``core.engine.Engine``."""
        encoder = getattr(self.model, branch).encoder.eval()
        try:
            found = encoder.tokens(self.tensor(images), layers)
        finally:
            encoder.train()
        pick = {"cls": lambda x: x[:, 0], "mean": lambda x: x[:, 1:].mean(1), "all": lambda x: x}
        return {name: self.array(pick[tokens](x)) for name, x in found.items()}
