"""Implements ``core.engine.Engine`` in OneFlow."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import cast

import numpy as np
import oneflow as flow
from oneflow import Tensor

from triptych.backends.oneflow import ops, parallel, pipeline, sharded
from triptych.backends.oneflow.courier import Courier
from triptych.backends.oneflow.methods import METHODS, Pair
from triptych.backends.oneflow.optim import OPTIMIZERS, Optimizer
from triptych.backends.oneflow.owned import Owned, Piece
from triptych.backends.oneflow.state import NUMPY, to_array
from triptych.backends.oneflow.vit import VisionTransformer
from triptych.core import engine as core
from triptych.core.config.spec import RunSpec
from triptych.core.contracts import ALONE, Array, Outcome, Ranks, Slot
from triptych.core.optim import groups
from triptych.core.parallel.sharding import splits
from triptych.core.parallel.stages import stages


class Engine(core.Engine):
    """The engine of one run. Its tensors are float32, or float64 if that is the precision."""

    model: Pair
    optimizer: Optimizer
    stage: pipeline.Stage | None
    # OneFlow has no public name for the base class of its exceptions.
    failures = (RuntimeError, flow._oneflow_internal.exception.Exception)

    def __init__(
        self, spec: RunSpec, state: Mapping[str, Array], device: str, ranks: Ranks = ALONE
    ) -> None:
        super().__init__(spec, ops, parallel.context(device, spec.precision, ranks), ranks)
        self.dtype = flow.float64 if spec.precision == "float64" else flow.float32
        self.layout = sharded.Layout(splits(spec), ranks, device)
        model = METHODS[spec.method.name](spec, ranks)
        sharded.divide(model, self.layout.table, ranks.tensor)
        self._trained = [name for name, p in model.named_parameters() if p.requires_grad]
        self._missing = {name: self._shape(x) for name, x in model.state_dict().items()}
        like = flow.empty((0,), dtype=self.dtype, device=device)
        self.stage = pipeline.keep_stage(model, spec, ranks.pipeline, like)
        self._stages = stages(spec)
        self.model = model.to(device).to(self.dtype).train()
        for module in self.model.modules():
            if isinstance(module, VisionTransformer):
                module.recompute = spec.parallel.recompute
        self.courier = None if device == "cpu" else Courier(device, self.dtype)
        values, packed = model.pack(spec)
        self.load_model(state)
        self.optimizer = self._optimizer(values, packed)

    def _shape(self, x: Tensor) -> sharded.Missing:
        kind = self.dtype if x.is_floating_point() else x.dtype
        return sharded.Missing(tuple(x.shape), kind)

    def _optimizer(self, values: Tensor, packed: Sequence[str]) -> Optimizer:
        """The optimizer of the packed parameters. Arguments as ``Pair.pack`` returns them."""
        spec, replicas = self.spec, self.ranks.replicas
        named = dict(self.model.named_parameters())
        own = {name: named[name] for name in packed}
        self.owned = Owned(values, replicas) if spec.parallel.shard_optimizer else None
        others, zero = [replicas] if self.owned else [], values.new_zeros(())
        norms = sharded.Norms(self.layout.table, self.ranks, *others, nothing=zero)
        rule, members = OPTIMIZERS[spec.optim.name], groups.assign(own, spec)
        return rule(own, values, spec.optim, members, norms, self.owned)

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
        if self.stage and not self.stage.is_last:
            with flow.no_grad():
                return compute(*inputs), [flow.zeros_like(x) for x in inputs]
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
            slots = self._owned_slots("", self.optimizer.owned_gradients(self.owned))
        else:
            slots = self._slots("", self.optimizer.gradients)
        yield from ((name, slots[name].read) for name in self._trained)

    def gradient_norm(self) -> Tensor:
        """See ``core.engine.Engine``."""
        return self.optimizer.gradient_norm()

    def model_slots(self) -> dict[str, Slot]:
        """See ``core.engine.Engine``."""
        own = self.model.state_dict()
        if self.stage:
            stage, missing = self.ranks.pipeline.rank, self._missing
            own = {n: own[n] if self._stages[n] == stage else x for n, x in missing.items()}
        return self.layout.slots(own)

    def moment_slots(self) -> dict[str, Slot]:
        """See ``core.engine.Engine``."""
        found: dict[str, Slot] = {}
        for kind in self.optimizer.kinds:
            if self.owned:
                pieces = self.optimizer.owned_moments(kind, self.owned)
                found.update(self._owned_slots(f"optimizer.{kind}.", pieces))
            else:
                found.update(self._slots(f"optimizer.{kind}.", self.optimizer.moments(kind)))
        return found

    def _slots(self, prefix: str, own: Mapping[str, Tensor]) -> dict[str, Slot]:
        """The slots of a tensor of each trainable parameter of all stages."""
        names = self._trained if self.stage else own
        return self.layout.slots({f"{prefix}{n}": own.get(n, self._missing[n]) for n in names})

    def _owned_slots(self, prefix: str, own: Mapping[str, Piece]) -> dict[str, Slot]:
        """Likewise, for pieces."""
        names = self._trained if self.stage else own
        every = {f"{prefix}{n}": own.get(n, Piece(None, 0, self._missing[n].shape)) for n in names}
        return self.layout.owned_slots(every, cast(Owned, self.owned))
