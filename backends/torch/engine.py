"""``core.engine.Engine`` in PyTorch."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from triptych.backends.torch import ops, parallel
from triptych.backends.torch.methods import METHODS
from triptych.backends.torch.optim import OPTIMIZERS
from triptych.backends.torch.state import model_slots, slots, tensor_slot, to_array
from triptych.core import engine as core
from triptych.core import methods
from triptych.core.config.spec import RunSpec
from triptych.core.contracts import Array, Batch, Hyper, Outcome, Slot


class Engine(core.Engine):
    """One run. The state's tensors are float32, or float64 where that is the precision."""

    def __init__(self, spec: RunSpec, state: Mapping[str, Array], device: str) -> None:
        self.spec, self.ops = spec, ops
        self.method = methods.METHODS[spec.method.name]
        self.context = parallel.context(device, spec.precision)
        self.dtype = torch.float64 if spec.precision == "float64" else torch.float32
        model = METHODS[spec.method.name](spec).to(device=device, dtype=self.dtype)
        self.model = model.train()
        for name, slot in model_slots(model).items():
            slot.write(state[name])
        trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.optimizer = OPTIMIZERS[spec.optim.name](trainable, spec.optim)

    def tensor(self, array: Array) -> Tensor:
        """See ``core.engine.Engine``."""
        tensor = torch.from_numpy(array)
        return tensor.to(self.context.device, self.dtype if tensor.is_floating_point() else None)

    def array(self, tensor: Tensor) -> Array:
        """See ``core.engine.Engine``."""
        return to_array(tensor)

    def backward(self, loss: Tensor) -> None:
        """See ``core.engine.Engine``."""
        self.optimizer.zero_grad()
        loss.backward()

    def gradients(self) -> Iterator[tuple[str, Callable[[], Array]]]:
        """See ``core.engine.Engine``."""
        for name, parameter in self.optimizer.named.items():
            yield name, tensor_slot(parameter.grad).read

    def gradient_norm(self) -> Tensor:
        """See ``core.engine.Engine``."""
        return self.optimizer.gradient_norm()

    def slots(self) -> Mapping[str, Slot]:
        """See ``core.engine.Engine``."""
        return slots(self.model, self.optimizer)

    @torch.no_grad()
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

    def _differentiate(self, batch: Batch, draws: Mapping[str, Array], hyper: Hyper) -> Outcome:
        with self._autocast():
            return super()._differentiate(batch, draws, hyper)

    def _autocast(self) -> AbstractContextManager[None]:
        kind = self.context.device.partition(":")[0]
        return torch.autocast(kind, torch.bfloat16, enabled=self.context.precision == "bfloat16")
