"""Implements ``core.engine.Engine`` in Paddle."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import numpy as np
import paddle
from paddle import Tensor

from triptych.backends.paddle import ops, parallel, sharded
from triptych.backends.paddle.layers import linear_weights
from triptych.backends.paddle.methods import METHODS, Pair
from triptych.backends.paddle.optim import OPTIMIZERS, Optimizer
from triptych.backends.paddle.state import to_array
from triptych.backends.paddle.vit import VisionTransformer
from triptych.core import engine as core
from triptych.core.config.spec import RunSpec
from triptych.core.contracts import ALONE, Array, Outcome, Ranks, Slot
from triptych.core.optim import groups
from triptych.core.parallel.sharding import split_of, splits


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
        self.splits = splits(spec)
        with _new_layers_in(self.dtype):
            self.model = METHODS[spec.method.name](spec, ranks)
        for layer in self.model.sublayers():
            if isinstance(layer, VisionTransformer):
                layer.recompute = spec.parallel.recompute
        sharded.divide(self.model, self.splits, ranks.tensor)
        self.model.train()
        self.transposed = linear_weights(self.model)
        self.load_model(state)
        trainable = {n: p for n, p in self.model.named_parameters() if not p.stop_gradient}
        members = groups.assign(trainable, spec)
        norms = sharded.Norms(self.splits, ranks)
        copies = ranks.replicas if spec.parallel.shard_optimizer else ALONE.replicas
        self.optimizer = OPTIMIZERS[spec.optim.name](trainable, spec.optim, members, norms, copies)

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
        parameters = list(self.optimizer.named.values())
        gradients = [paddle.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = self.replicas.sum(paddle.concat([gradient.flatten() for gradient in gradients]))
        for parameter, part in zip(
            parameters, paddle.split(flat, [p.size for p in parameters]), strict=True
        ):
            parameter.grad = part.reshape(parameter.shape)

    def gradients(self) -> Iterator[tuple[str, Callable[[], Array]]]:
        """See ``core.engine.Engine``."""
        for name, parameter in self.optimizer.named.items():
            if parameter.grad is not None:
                yield name, self._slot(name, parameter.grad).read

    def gradient_norm(self) -> Tensor:
        """See ``core.engine.Engine``."""
        return self.optimizer.gradient_norm()

    def model_slots(self) -> dict[str, Slot]:
        """See ``core.engine.Engine``."""
        return {n: self._slot(n, tensor) for n, tensor in self.model.state_dict().items()}

    def moment_slots(self) -> dict[str, Slot]:
        """See ``core.engine.Engine``."""
        optimizer = self.optimizer
        return {
            f"optimizer.{kind}.{name}": optimizer.owners.slot(
                name, moments.get(name), partial(self._slot, name)
            )
            for kind, moments in optimizer.moments().items()
            for name in optimizer.named
        }

    def _slot(self, name: str, tensor: Tensor) -> Slot:
        """The slot of a tensor that is divided as the one with this name is."""
        split = split_of(name, self.splits)
        return sharded.whole_slot(tensor, name in self.transposed, split, self.ranks.tensor)


@contextmanager
def _new_layers_in(dtype: paddle.dtype) -> Iterator[None]:
    """Layers made in the block have this precision. The process's default comes back after it."""
    former = paddle.get_default_dtype()
    paddle.set_default_dtype(dtype)
    try:
        yield
    finally:
        paddle.set_default_dtype(former)
