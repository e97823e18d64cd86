"""``core.contracts.Model`` in NumPy: student, teacher and queue."""

from typing import cast

import numpy as np
from autograd.tracer import getval

from triptych.core import parameters
from triptych.core.config.spec import MocoV3Spec, QueueSpec, RunSpec
from triptych.core.contracts import Array, Tensor
from triptych.core.methods import ring
from triptych.core.reference.encoders import encode
from triptych.core.reference.layers import Norms, mlp, plain_mlp
from triptych.core.reference.moca import Codebook, Moca


class Model:
    """``values`` holds every tensor by its canonical name."""

    def __init__(self, spec: RunSpec, values: dict[str, Tensor]) -> None:
        self.spec, self.values = spec, values
        self.memory: Queue | Codebook = Queue(values)
        self._training = Norms(True, spec.batch_norm.virtual_ranks)
        self._teacher = [
            p.name for p in parameters.table(spec) if p.name.startswith("teacher.") and not p.buffer
        ]

    def branch(self, name: str, view: Tensor, norms: Norms) -> Tensor:
        """Encoder and projector. (N, C, H, W) -> (N, D)."""
        tokens = encode(self.values, f"{name}.encoder", view, self.spec.model, norms)["final"]
        method = cast(QueueSpec | MocoV3Spec, self.spec.method)
        projector = f"{name}.projector"
        layers = len(parameters.projector_widths(self.spec.model.features, method)) - 1
        if isinstance(method, QueueSpec):
            return plain_mlp(self.values, projector, tokens[:, 0], layers)
        return mlp(self.values, projector, tokens[:, 0], layers, norms)

    def query(self, view: Tensor) -> Tensor:
        """See ``core.contracts.Model``."""
        x, method = self.branch("student", view, self._training), self.spec.method
        if not isinstance(method, MocoV3Spec):
            return x
        return mlp(self.values, "student.predictor", x, method.predictor_layers, self._training)

    def key(self, view: Tensor) -> Tensor:
        """See ``core.contracts.Model``."""
        return self.branch("teacher", view, self._training)

    def update_teacher(self, momentum: float) -> None:
        """See ``core.contracts.Model``."""
        for name in self._teacher:
            source = getval(self.values[name.replace("teacher.", "student.", 1)])
            self.values[name] = momentum * self.values[name] + (1.0 - momentum) * source


class MocaModel(Moca, Model):
    """``core.contracts.MocaModel``."""

    def __init__(self, spec: RunSpec, values: dict[str, Tensor]) -> None:
        Model.__init__(self, spec, values)
        Moca.__init__(self, spec, values)
        self.memory = Codebook(values)


class Queue:
    """``core.contracts.Memory`` over the tensors under ``memory.``, where the method has them."""

    def __init__(self, values: dict[str, Tensor]) -> None:
        self._values = values

    @property
    def queue(self) -> Tensor:
        """See ``core.contracts.Memory``."""
        return self._values["memory.queue"]

    @property
    def pointer(self) -> int:
        """See ``core.contracts.Memory``."""
        return int(self._values["memory.pointer"])

    def enqueue(self, keys: Array) -> None:
        """See ``core.contracts.Memory``."""
        size = self.queue.shape[1]
        for columns, rows in ring.segments(self.pointer, len(keys), size):
            self.queue[:, columns] = keys[rows].T
        self._values["memory.pointer"] = np.array(ring.advance(self.pointer, len(keys), size))
