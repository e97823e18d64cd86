"""Implements ``core.engine.Engine`` in PyTorch."""

from collections.abc import Callable, Iterator, Mapping
from typing import cast

import torch
from torch import Tensor

from triptych.backends.torch import ops, parallel, sharded
from triptych.backends.torch.methods import METHODS, Pair
from triptych.backends.torch.optim import OPTIMIZERS, Optimizer
from triptych.backends.torch.owned import Owned
from triptych.backends.torch.state import to_array
from triptych.backends.torch.vit import VisionTransformer
from triptych.core import engine as core
from triptych.core.config.spec import RunSpec
from triptych.core.contracts import ALONE, Array, Outcome, Ranks, Slot
from triptych.core.optim import groups
from triptych.core.parallel.sharding import splits


class Engine(core.Engine):
    """The engine of one run. Its tensors are float32, or float64 if that is the precision."""

    model: Pair
    optimizer: Optimizer
    failures = (RuntimeError,)

    def __init__(
        self, spec: RunSpec, state: Mapping[str, Array], device: str, ranks: Ranks = ALONE
    ) -> None:
        super().__init__(spec, ops, parallel.context(device, spec.precision, ranks), ranks)
        self.dtype = torch.float64 if spec.precision == "float64" else torch.float32
        self.layout = sharded.Layout(splits(spec), ranks, device)
        model = METHODS[spec.method.name](spec, ranks)
        sharded.divide(model, self.layout.table, ranks.tensor)
        self.model = model.to(device=device, dtype=self.dtype).train()
        self.model.mixed = spec.precision == "bfloat16"
        for module in self.model.modules():
            if isinstance(module, VisionTransformer):
                module.recompute = spec.parallel.recompute
        self.load_model(state)
        self.optimizer = self._optimizer()

    def _optimizer(self) -> Optimizer:
        spec, ranks = self.spec, self.ranks
        trainable = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self.owned = Owned(trainable, ranks.replicas) if spec.parallel.shard_optimizer else None
        self._owners = (ranks.replicas,) if self.owned else ()
        norms = sharded.Norms(self.layout.table, ranks.tensor, *self._owners)
        members = groups.assign(trainable, spec)
        return OPTIMIZERS[spec.optim.name](trainable, spec.optim, members, norms, self.owned)

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

    def gradients(self) -> Iterator[tuple[str, Callable[[], Array]]]:
        """See ``core.engine.Engine``."""
        for name, parameter in self.optimizer.named.items():
            gradient = parameter.grad
            if gradient is None and self.owned:
                gradient = torch.empty_like(parameter, device="meta")
            if gradient is not None:
                yield name, self.layout.slots({name: gradient}, *self._owners)[name].read

    def gradient_norm(self) -> Tensor:
        """See ``core.engine.Engine``."""
        return self.optimizer.gradient_norm()

    def model_slots(self) -> dict[str, Slot]:
        """See ``core.engine.Engine``."""
        return self.layout.slots(self.model.state_dict(keep_vars=True))

    def moment_slots(self) -> dict[str, Slot]:
        """See ``core.engine.Engine``."""
        return self.layout.slots(self.optimizer.moments(), *self._owners)
