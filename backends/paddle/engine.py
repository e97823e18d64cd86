"""Implements ``core.engine.Engine`` in Paddle."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import paddle
from paddle import Tensor

from triptych.backends.paddle import ops, parallel
from triptych.backends.paddle.layers import linear_weights
from triptych.backends.paddle.methods import METHODS, Pair
from triptych.backends.paddle.optim import OPTIMIZERS, Optimizer
from triptych.backends.paddle.state import slots, tensor_slot, to_array
from triptych.core import engine as core
from triptych.core.config.spec import RunSpec
from triptych.core.contracts import ALONE, Array, Outcome, Ranks, Slot
from triptych.core.optim import groups


class Engine(core.Engine):
    """The engine of one run. Its tensors are float32, or float64 if that is the precision."""

    model: Pair
    optimizer: Optimizer
    failures = (RuntimeError, MemoryError, OSError, SystemError)

    def __init__(
        self, spec: RunSpec, state: Mapping[str, Array], device: str, ranks: Ranks = ALONE
    ) -> None:
        super().__init__(spec, ops, parallel.context(device, spec.precision, ranks), ranks)
        self.dtype = paddle.float64 if spec.precision == "float64" else paddle.float32
        with _new_layers_in(self.dtype):
            self.model = METHODS[spec.method.name](spec, ranks)
        self.model.train()
        self.transposed = linear_weights(self.model)
        self.load_model(state)
        trainable = {n: p for n, p in self.model.named_parameters() if not p.stop_gradient}
        members = groups.assign(trainable, spec)
        self.optimizer = OPTIMIZERS[spec.optim.name](trainable, spec.optim, members)

    def tensor(self, array: Array) -> Tensor:
        """See ``core.engine.Engine``."""
        dtype = self.dtype if np.issubdtype(array.dtype, np.floating) else None
        return paddle.to_tensor(array, dtype, place=self.context.device.replace("cuda", "gpu"))

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
        leaves = [x.detach() for x in inputs]
        for leaf in leaves:
            leaf.stop_gradient = False
        outcome = compute(*leaves)
        outcome.loss.backward()
        return outcome, [leaf.grad for leaf in leaves]

    def sum_gradients(self) -> None:
        """See ``core.engine.Engine``."""
        for parameter in self.optimizer.named.values():
            gradient = parameter.grad
            parameter.grad = self.replicas.sum(
                paddle.zeros_like(parameter) if gradient is None else gradient
            )

    def gradients(self) -> Iterator[tuple[str, Callable[[], Array]]]:
        """See ``core.engine.Engine``."""
        for name, parameter in self.optimizer.named.items():
            if parameter.grad is not None:
                yield name, tensor_slot(parameter.grad, name in self.transposed).read

    def gradient_norm(self) -> Tensor:
        """See ``core.engine.Engine``."""
        return self.optimizer.gradient_norm()

    def model_slots(self) -> dict[str, Slot]:
        """See ``core.engine.Engine``."""
        return slots(self.model.state_dict(), self.transposed)

    def moment_slots(self) -> dict[str, Slot]:
        """See ``core.engine.Engine``."""
        moments = self.optimizer.moments()
        # The name of a moment is "optimizer.<kind>.<name of the parameter>".
        return slots(moments, [n for n in moments if n.split(".", 2)[2] in self.transposed])


@contextmanager
def _new_layers_in(dtype: paddle.dtype) -> Iterator[None]:
    """Layers made in the block have this precision. The process's default comes back after it."""
    former = paddle.get_default_dtype()
    paddle.set_default_dtype(dtype)
    try:
        yield
    finally:
        paddle.set_default_dtype(former)
