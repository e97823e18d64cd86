"""``core.engine.Engine`` in Paddle."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import paddle
from paddle import Tensor

from triptych.backends.paddle import ops, parallel
from triptych.backends.paddle.layers import linear_weights
from triptych.backends.paddle.methods import METHODS
from triptych.backends.paddle.optim import OPTIMIZERS
from triptych.backends.paddle.state import model_slots, slots, tensor_slot, to_array
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
        self.dtype = paddle.float64 if spec.precision == "float64" else paddle.float32
        with _new_layers_in(self.dtype):
            self.model = METHODS[spec.method.name](spec)
        self.model.train()
        for name, slot in model_slots(self.model).items():
            slot.write(state[name])
        trainable = {n: p for n, p in self.model.named_parameters() if not p.stop_gradient}
        self.optimizer = OPTIMIZERS[spec.optim.name](trainable, spec.optim)

    def tensor(self, array: Array) -> Tensor:
        """See ``core.engine.Engine``."""
        dtype = self.dtype if np.issubdtype(array.dtype, np.floating) else None
        return paddle.to_tensor(array, dtype, place=self.context.device.replace("cuda", "gpu"))

    def array(self, tensor: Tensor) -> Array:
        """See ``core.engine.Engine``."""
        return to_array(tensor)

    def backward(self, loss: Tensor) -> None:
        """See ``core.engine.Engine``."""
        self.optimizer.zero_grad()
        loss.backward()

    def gradients(self) -> Iterator[tuple[str, Callable[[], Array]]]:
        """See ``core.engine.Engine``."""
        weights = linear_weights(self.model)
        for name, parameter in self.optimizer.named.items():
            yield name, tensor_slot(parameter.grad, name in weights).read

    def gradient_norm(self) -> Tensor:
        """See ``core.engine.Engine``."""
        return self.optimizer.gradient_norm()

    def slots(self) -> Mapping[str, Slot]:
        """See ``core.engine.Engine``."""
        return slots(self.model, self.optimizer)

    @paddle.no_grad()
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
        module = getattr(self.model, branch)
        module.eval()
        found = module.encoder.tokens(self.tensor(images), layers)
        pick = {"cls": lambda x: x[:, 0], "mean": lambda x: x[:, 1:].mean(1), "all": lambda x: x}
        features = {name: pick[tokens](x) for name, x in found.items()}
        if projection:
            features["projection"] = module.projector(found["final"][:, 0])
        module.train()
        return {name: self.array(x) for name, x in features.items()}


@contextmanager
def _new_layers_in(dtype: paddle.dtype) -> Iterator[None]:
    """Layers made inside have this precision; what is set for the whole process comes back."""
    former = paddle.get_default_dtype()
    paddle.set_default_dtype(dtype)
    try:
        yield
    finally:
        paddle.set_default_dtype(former)
