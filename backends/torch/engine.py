"""Implements ``core.engine.Engine`` in PyTorch."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
from timm.models.vision_transformer import Block
from torch import Tensor

from triptych.backends.torch import mixed, parallel, pipeline, sharded
from triptych.backends.torch.courier import Courier
from triptych.backends.torch.methods import METHODS, Pair
from triptych.backends.torch.optim import OPTIMIZERS, Optimizer
from triptych.backends.torch.owned import Owned
from triptych.backends.torch.resnet import ResNet
from triptych.backends.torch.state import to_array
from triptych.backends.torch.vit import VisionTransformer
from triptych.core import engine as core
from triptych.core.config.spec import RunSpec
from triptych.core.contracts import ALONE, Array, Outcome, Ranks, Slot
from triptych.core.machine.devices import compiles
from triptych.core.optim import groups
from triptych.core.parallel.sharding import splits
from triptych.core.parallel.stages import stages

MIXED = {"bfloat16": torch.bfloat16, "float16": torch.float16}
"""Precision -> type in which the networks compute, if it is not that of the parameters."""


class Engine(core.Engine):
    """The engine of one run. Its tensors are float32, or float64 if that is the precision."""

    model: Pair
    optimizer: Optimizer
    stage: pipeline.Stage | None
    failures = (RuntimeError,)

    def __init__(
        self, spec: RunSpec, state: Mapping[str, Array], device: str, ranks: Ranks = ALONE
    ) -> None:
        operations = mixed.operations(mixed=spec.precision in MIXED)
        context = parallel.context(device, spec.precision, ranks)
        super().__init__(spec, operations, context, ranks)
        self.dtype = torch.float64 if spec.precision == "float64" else torch.float32
        self.layout = sharded.Layout(splits(spec), ranks, device)
        model = METHODS[spec.method.name](spec, ranks)
        sharded.divide(model, self.layout.table, ranks.tensor)
        self._trained = [name for name, p in model.named_parameters() if p.requires_grad]
        self._shapes = {
            n: _shape(t, self.dtype) for n, t in model.state_dict(keep_vars=True).items()
        }
        like = torch.empty(0, dtype=self.dtype, device=device)
        self.stage = pipeline.keep_stage(model, spec, ranks.pipeline, like)
        self._stages, self._pipeline = stages(spec), (ranks.pipeline,) if self.stage else ()
        if self.stage:
            model.follow()
        self.model = model.to(device=device, dtype=self.dtype).train()
        self.model.mixed = MIXED.get(spec.precision)
        if compiles(spec, "torch", device, able=True):
            self.model.compiler = "inductor"
        for module in self.model.modules():
            if isinstance(module, VisionTransformer):
                module.recompute = spec.parallel.recompute
            if isinstance(module, ResNet) and self.dtype != torch.float64:
                module.hasten(last=device == "cpu" or self.model.mixed is not None)
            if isinstance(module, Block) and self.model.mixed and device == "cpu":
                # In 16 bits, the fused kernel's backward pass takes longer than that of its parts.
                cast(Any, module.attn).fused_attn = False
        self.courier = None if device == "cpu" else Courier(device, self.dtype)
        self.load_model(state)
        self.optimizer = self._optimizer()

    def _optimizer(self) -> Optimizer:
        spec, ranks = self.spec, self.ranks
        own = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self.owned = Owned(own, ranks.replicas) if spec.parallel.shard_optimizer else None
        self._owners = (*((ranks.replicas,) if self.owned else ()), *self._pipeline)
        zero = torch.zeros((), dtype=self.dtype, device=self.context.device)
        norms = sharded.Norms(self.layout.table, ranks.tensor, *self._owners, nothing=zero)
        members = groups.assign(own, spec)
        return OPTIMIZERS[spec.optim.name](own, spec.optim, members, norms, self.owned)

    def tensor(self, array: Array) -> Tensor:
        """See ``core.engine.Engine``."""
        tensor = torch.from_numpy(array)
        return tensor.to(self.context.device, self.dtype if tensor.is_floating_point() else None)

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
            with torch.no_grad():
                return compute(*inputs), [torch.zeros_like(x) for x in inputs]
        leaves = [x.detach().requires_grad_() for x in inputs]
        outcome = compute(*leaves)
        outcome.loss.backward()
        return outcome, [leaf.grad for leaf in leaves]

    def sum_gradients(self) -> None:
        """See ``core.engine.Engine``."""
        if self.owned:
            self.owned.sum_gradients()
        else:
            replicas = cast(parallel.Group, self.replicas)
            replicas.sum_gradients(self.optimizer.named.values())

    def divide_gradients(self, divisor: float) -> None:
        """See ``core.engine.Engine``."""
        own = [p.grad for p in self.optimizer.own.values() if p.grad is not None]
        torch._foreach_div_(own, divisor)

    def gradients(self) -> Iterator[tuple[str, Callable[[], Array]]]:
        """See ``core.engine.Engine``."""
        for name in self._trained:
            parameter = self.optimizer.named.get(name)
            gradient = None if parameter is None else parameter.grad
            if gradient is None and self._owners:
                gradient = self._shapes[name]
            if gradient is not None:
                yield name, self.layout.slots({name: gradient}, *self._owners)[name].read

    def gradient_norm(self) -> Tensor:
        """See ``core.engine.Engine``."""
        return self.optimizer.gradient_norm()

    def model_slots(self) -> dict[str, Slot]:
        """See ``core.engine.Engine``."""
        own = self.model.state_dict(keep_vars=True)
        if self.stage:
            stage = self.ranks.pipeline.rank
            own = {n: own[n] if self._stages[n] == stage else x for n, x in self._shapes.items()}
        return self.layout.slots(own, *self._pipeline)

    def moment_slots(self) -> dict[str, Slot]:
        """See ``core.engine.Engine``."""
        own = self.optimizer.moments()
        shapes = {
            f"optimizer.{kind}.{name}": self._shapes[name]
            for kind in self.optimizer.kinds
            for name in self._trained
        }
        return self.layout.slots({**shapes, **own}, *self._owners)


def _shape(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor of the same shape, in the precision of the run, without values."""
    kind = dtype if tensor.is_floating_point() else tensor.dtype
    return torch.empty_like(tensor, dtype=kind, device="meta")
