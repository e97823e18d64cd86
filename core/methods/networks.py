"""Student and teacher of any framework: what a backend's networks need no framework for.

A backend's class inherits from one of these first and from the framework's module class last. What
it adds is native: the parts, and how the teacher follows the student.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from typing import Any, cast

from triptych.core.config.spec import MocaSpec, QueueSpec, RunSpec, VitSpec
from triptych.core.contracts import Array, Codebook, Memory, Slot, Tensor


def run(
    x: Tensor, layers: Iterable[Callable[[Tensor], Tensor]], keep: Collection[int] = ()
) -> tuple[Tensor, dict[int, Tensor]]:
    """Layers one after the other.

    Args:
        keep: 0-based indices of the layers whose output is wanted besides.

    Returns:
        The last layer's output, and those of the layers in ``keep``.
    """
    kept: dict[int, Tensor] = {}
    for i, layer in enumerate(layers):
        x = layer(x)
        if i in keep:
            kept[i] = x
    return x, kept


class Branch:
    """Encoder and projector, in a student the predictor too. Images (N, C, H, W) -> (N, D)."""

    encoder: Any
    projector: Any
    predictor: Any

    def forward(self, images: Tensor) -> Tensor:
        """Projection, and where there is a predictor its prediction."""
        x = self.projector(self.encoder(images))
        return self.predictor(x) if hasattr(self, "predictor") else x


class Branches:
    """``core.contracts.Networks``, and ``Model`` but for the move of the teacher.

    The parts come from the backend's class:
        student, teacher: modules that hold an ``encoder``, a ``core.contracts.Encoder``.
        branch: (spec, predictor=True or False) -> such a module of a contrastive method.
        queue: section of the spec -> ``core.contracts.Memory``.
        codebook: sections ``model`` and ``method`` -> ``core.contracts.Codebook``.
        moca_student: the same -> student of MOCA. moca_teacher: section ``model`` -> its teacher.
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
        """What a part of the networks gives, computed in the precision of the run.

        A backend with a mixed precision overrides this. Nothing else of a step is in mixed
        precision: what comes back is float32, or float64 where that is the precision.
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
        """Indices as a tensor of their own beside ``like``. ids: any shape, int64.

        The framework's part: a backend's class defines it.
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
