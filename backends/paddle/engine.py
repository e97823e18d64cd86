"""Implements ``core.engine.Engine`` in Paddle."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import paddle
from paddle import Tensor

from triptych.backends.paddle import ops, parallel, sharded
from triptych.backends.paddle.courier import Courier
from triptych.backends.paddle.layers import linear_weights
from triptych.backends.paddle.methods import METHODS, Pair
from triptych.backends.paddle.optim import OPTIMIZERS, Optimizer
from triptych.backends.paddle.pipeline import Stage, keep_stage
from triptych.backends.paddle.state import to_array
from triptych.backends.paddle.vit import VisionTransformer
from triptych.core import engine as core
from triptych.core.config.spec import RunSpec
from triptych.core.contracts import ALONE, Array, Outcome, Ranks, Slot
from triptych.core.optim import groups
from triptych.core.parallel.sharding import split_of, splits
from triptych.core.parallel.stages import stages


class Engine(core.Engine):
    """The engine of one run. Its tensors are float32, or float64 if that is the precision."""

    model: Pair
    optimizer: Optimizer
    stage: Stage | None
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
        self.transposed = linear_weights(self.model)
        self._whole = {name: self._like(name, x) for name, x in self.model.state_dict().items()}
        self._trained = [n for n, p in self.model.named_parameters() if not p.stop_gradient]
        self._stages = stages(spec)
        self.stage = keep_stage(self.model, spec, ranks.pipeline, self.dtype)
        if self.stage:
            self.model.follow()
        self.model.train()
        self.model.mixed = "bfloat16" if spec.precision == "bfloat16" else None
        self.courier = None if device == "cpu" else Courier(device, self.dtype)
        self.load_model(state)
        self.model.pack()
        self.optimizer = self._optimizer()

    def _optimizer(self) -> Optimizer:
        spec, ranks = self.spec, self.ranks
        own = {n: p for n, p in self.model.named_parameters() if not p.stop_gradient}
        norms = sharded.Norms(self.splits, ranks, paddle.zeros([], self.dtype))
        copies = ranks.replicas if spec.parallel.shard_optimizer else ALONE.replicas
        members = groups.assign(own, spec)
        return OPTIMIZERS[spec.optim.name](own, spec.optim, members, norms, copies)

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
        if self.stage and not self.stage.is_last:
            with paddle.no_grad():
                return compute(*inputs), [paddle.zeros_like(x) for x in inputs]
        leaves = [x.detach() for x in inputs]
        for leaf in leaves:
            leaf.stop_gradient = False
        outcome = compute(*leaves)
        outcome.loss.backward()
        return outcome, [leaf.grad for leaf in leaves]

    def sum_gradients(self) -> None:
        """See ``core.engine.Engine``."""
        parameters = list(self.optimizer.named.values())
        if not parameters:  # a stage of a pipeline may train nothing
            return
        gradients = [paddle.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = self.replicas.sum(paddle.concat([gradient.flatten() for gradient in gradients]))
        for parameter, part in zip(
            parameters, paddle.split(flat, [p.size for p in parameters]), strict=True
        ):
            parameter.grad = part.reshape(parameter.shape)

    def gradients(self) -> Iterator[tuple[str, Callable[[], Array]]]:
        """See ``core.engine.Engine``."""
        for name in self._trained:
            parameter = self.optimizer.named.get(name)
            gradient = None if parameter is None else parameter.grad
            if gradient is not None or self.stage:
                yield name, self._slot(name, gradient).read

    def gradient_norm(self) -> Tensor:
        """See ``core.engine.Engine``."""
        return self.optimizer.gradient_norm()

    def model_slots(self) -> dict[str, Slot]:
        """See ``core.engine.Engine``."""
        own = self.model.state_dict()
        return {name: self._slot(name, own.get(name)) for name in self._whole}

    def moment_slots(self) -> dict[str, Slot]:
        """See ``core.engine.Engine``."""
        moments, optimizer = self.optimizer.moments(), self.optimizer
        found = {}
        for kind, own in moments.items():
            for name in self._trained:
                slot = None
                if name in optimizer.named:
                    values = own.get(name)
                    slot = None if values is None else self._own_slot(name, values)
                    slot = optimizer.owners.slot(name, slot, self._whole[name])
                found[f"optimizer.{kind}.{name}"] = self._of_stage(name, slot)
        return found

    def _slot(self, name: str, own: Tensor | None) -> Slot:
        """The slot of a tensor of the model, or of its gradient; None: another stage has it."""
        return self._of_stage(name, None if own is None else self._own_slot(name, own))

    def _of_stage(self, name: str, own: Slot | None) -> Slot:
        group, stage = self.ranks.pipeline, self._stages[name]
        own = own if group.rank == stage or group.count == 1 else None
        return sharded.sent_slot(own, self._whole[name], group, stage)

    def _own_slot(self, name: str, tensor: Tensor) -> Slot:
        """The slot of a tensor that is divided as the one with this name is."""
        split = split_of(name, self.splits)
        return sharded.whole_slot(tensor, name in self.transposed, split, self.ranks.tensor)

    def _like(self, name: str, tensor: Tensor) -> sharded.Whole:
        return sharded.Whole(self._own_slot(name, tensor).shape, tensor.dtype)


@contextmanager
def _new_layers_in(dtype: paddle.dtype) -> Iterator[None]:
    """Layers made in the block have this precision. The process's default comes back after it."""
    former = paddle.get_default_dtype()
    paddle.set_default_dtype(dtype)
    try:
        yield
    finally:
        paddle.set_default_dtype(former)
