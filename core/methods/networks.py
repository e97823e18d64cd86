"""The code of student and teacher that needs no framework.

A backend's class inherits from one of these classes first and from the framework's module class
last. It adds the native code: the parts, and the update of the teacher.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from typing import Any, cast

from triptych.core.config.spec import MocaSpec, QueueSpec, RunSpec, VitSpec
from triptych.core.contracts import Array, Codebook, Memory, Slot, Tensor


def run(
    x: Tensor, layers: Iterable[Callable[[Tensor], Tensor]], keep: Collection[int] = ()
) -> tuple[Tensor, dict[int, Tensor]]:
    """Applies layers one after the other.

    Args:
        x: input of the first layer.
        layers: functions of one tensor.
        keep: indices, from 0, of layers whose output to return too.

    Returns:
        The output of the last layer, and the outputs of the layers in ``keep`` by index.
    """
    outputs: dict[int, Tensor] = {}
    for i, layer in enumerate(layers):
        x = layer(x)
        if i in keep:
            outputs[i] = x
    return x, outputs


class Branch:
    """Encoder and projector, and the predictor in a student. Images (N, C, H, W) -> (N, D)."""

    encoder: Any
    projector: Any
    predictor: Any

    def forward(self, images: Tensor) -> Tensor:
        """The projection, or the prediction if there is a predictor."""
        x = self.projector(self.encoder(images))
        return self.predictor(x) if hasattr(self, "predictor") else x


class Branches:
    """Implements ``core.contracts.Model`` except for ``update_teacher``.

    Attributes:
        student: module with an ``encoder``, which is a ``core.contracts.Encoder``.
        teacher: likewise.
        branch: builds such a module of a contrastive method from the spec and ``predictor``
            (True or False). The backend's class provides this and the following functions.
        queue: builds a ``core.contracts.Memory`` from the section ``method``.
        codebook: builds a ``core.contracts.Codebook`` from the sections ``model`` and ``method``.
        moca_student: builds the student of MOCA from the sections ``model`` and ``method``.
        moca_teacher: builds the teacher of MOCA from the section ``model``.
    """

    student: Any
    teacher: Any
    branch: Callable[..., Any]
    queue: Callable[[QueueSpec], Memory]
    codebook: Callable[[VitSpec, MocaSpec], Codebook]
    moca_student: Callable[[VitSpec, MocaSpec], Any]
    moca_teacher: Callable[[VitSpec], Any]

    def __init__(self, student: Any, teacher: Any) -> None:
        super().__init__()  # of the framework's module class
        self.student, self.teacher = student, teacher

    def compute(self, part: Callable[..., Any], *arguments: Tensor) -> Any:
        """The output of a part of the networks, computed in the precision of the run.

        A backend with mixed precision overrides this method. The rest of a step never uses mixed
        precision: the output is float32, or float64 if that is the precision of the run.
        """
        return part(*arguments)

    def query(self, view: Tensor) -> Tensor:
        """See ``core.contracts.Model``."""
        return self.compute(self.student, view)

    def key(self, view: Tensor) -> Tensor:
        """See ``core.contracts.Model``."""
        return self.compute(self.teacher, view)

    def features(
        self, branch: str, images: Tensor, layers: Sequence[int], *, projection: bool
    ) -> dict[str, Tensor]:
        """See ``core.contracts.Networks``."""
        module = getattr(self, branch)
        module.eval()
        features: dict[str, Tensor] = dict(module.encoder.tokens(images, layers))
        if projection:
            features["projection"] = module.projector(features["final"][:, 0])
        module.train()
        return features

    def counters(self) -> dict[str, Slot]:
        """See ``core.contracts.Networks``."""
        memory = getattr(self, "memory", None)
        names: Sequence[str] = getattr(memory, "counters", ())
        return {f"memory.{name}": Slot.counter(memory, name) for name in names}


class MoCo(Branches):
    """``core.contracts.QueueModel`` of MoCo v1 and v2."""

    def __init__(self, spec: RunSpec) -> None:
        super().__init__(self.branch(spec, predictor=False), self.branch(spec, predictor=False))
        self.memory = self.queue(cast(QueueSpec, spec.method))


class MoCoV3(Branches):
    """``core.contracts.Model`` of MoCo v3."""

    def __init__(self, spec: RunSpec) -> None:
        super().__init__(self.branch(spec, predictor=True), self.branch(spec, predictor=False))


class MOCA(Branches):
    """``core.contracts.MocaModel``."""

    def __init__(self, spec: RunSpec) -> None:
        model, method = cast(VitSpec, spec.model), cast(MocaSpec, spec.method)
        super().__init__(self.moca_student(model, method), self.moca_teacher(model))
        self.grid, self.early_layer = model.grid, method.early_layer
        self.memory = self.codebook(model, method)

    def index(self, ids: Array, like: Tensor) -> Tensor:
        """Copies indices to a tensor on the device of ``like``. A backend's class defines this.

        Args:
            ids: int64, of any shape.
            like: any tensor on the wanted device.
        """
        raise NotImplementedError

    def teacher_tokens(self, images: Tensor) -> Tensor:
        """See ``core.contracts.MocaModel``."""
        return self.compute(self.teacher.encoder.tokens, images)["final"][:, 1:]

    def encode(self, images: Tensor, ids: Array) -> tuple[Tensor, Tensor]:
        """See ``core.contracts.MocaModel``."""
        masked = partial(self.student.encoder.masked, early=self.early_layer)
        early, last = self.compute(masked, images, self.index(ids, images))
        return early, last

    def decode(self, image: Tensor, early: Tensor, ids: Array) -> Tensor:
        """See ``core.contracts.MocaModel``."""
        return self.compute(self.student.decoder, image, early, self.index(ids, early))

    def image_weights(self, words: Tensor) -> Tensor:
        """See ``core.contracts.MocaModel``."""
        return self.compute(self.student.image_predictor, words)

    def dense_weights(self, words: Tensor) -> Tensor:
        """See ``core.contracts.MocaModel``."""
        return self.compute(self.student.dense_predictor, words)
