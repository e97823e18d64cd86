"""What the networks of all methods share, and what a backend adds to them.

A backend's class inherits from a class here first and from the framework's module class last.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

from triptych.core import parameters
from triptych.core.config.spec import (
    BatchNormSpec,
    MocaSpec,
    ModelSpec,
    QueueSpec,
    RunSpec,
    TeacherStatistics,
    VitSpec,
)
from triptych.core.contracts import (
    Codebook,
    Encoder,
    Group,
    Index,
    Memory,
    Ranks,
    Slot,
    Tensor,
)
from triptych.core.parameters import Head


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


def scaled_block(block: Any, scales: tuple[Tensor, Tensor], x: Tensor) -> Tensor:
    """A transformer block whose residual branches have factors, as drop-path gives them.

    Args:
        block: with the modules ``norm1``, ``attn``, ``norm2`` and ``mlp``.
        scales: (N, 1, 1) each, the factors of attention and MLP.
        x: (N, T, D).
    """
    x = x + scales[0] * block.attn(block.norm1(x))
    x = x + scales[1] * block.mlp(block.norm2(x))
    return x


def walk(
    blocks: Iterable[Any], scales: Sequence[tuple[Tensor, Tensor]]
) -> list[Callable[[Tensor], Tensor]]:
    """The blocks as functions of the tokens, with the factors of their residual branches.

    Args:
        blocks: of a ViT, in order.
        scales: factors of each block; empty: all are 1.
    """
    if not scales:
        return list(blocks)
    return [partial(scaled_block, *pair) for pair in zip(blocks, scales, strict=True)]


def each_tensor(change: Callable[[Tensor], Tensor], output: Any) -> Any:
    """A tensor, or the tensors of a tuple or a dict of them, after the same change."""
    if isinstance(output, dict):
        return {name: each_tensor(change, tensor) for name, tensor in output.items()}
    if isinstance(output, tuple):
        return tuple(each_tensor(change, tensor) for tensor in output)
    return change(output)


class Branch:
    """A student or a teacher: a module that holds its parts under their canonical names."""

    encoder: Any
    projector: Any
    predictor: Any
    classifier: Any

    def __init__(self, **parts: Any) -> None:
        super().__init__()  # of the framework's module class
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, images: Tensor) -> Tensor:
        """The projection, or the prediction if there is a predictor. (N, C, H, W) -> (N, D)."""
        return self.projected(self.encoder(images))

    def projected(self, features: Tensor) -> Tensor:
        """Likewise, from the encoder's features (N, D)."""
        x = self.projector(features)
        return self.predictor(x) if hasattr(self, "predictor") else x

    def classified(
        self, images: Tensor, pooling: str, scales: Sequence[tuple[Tensor, Tensor]] = ()
    ) -> tuple[Tensor, Tensor]:
        """The feature (N, D) and the logits (N, classes). Arguments as in ``Encoder.pooled``."""
        feature = self.encoder.pooled(images, pooling, scales)
        return feature, self.classifier(feature)


class Kit(NamedTuple):
    """A framework's parts for the networks of all methods.

    Attributes:
        branch: ``Branch`` as a module class of the framework.
        encoder: builds the encoder of the section ``model``.
        head: builds a projector or predictor from its plan.
        set_batch_norm: applies the section ``batch_norm`` of one process to all batch norms in a
            module. The processes of the group given to it share the statistics of their batches;
            if there are several, ``virtual_ranks`` is 1.
        set_tracking: sets whether the batch norms in a module move their running statistics.
        queue: builds the queue from the section ``method``.
        codebook: builds the codebook from the sections ``model`` and ``method``.
        decoder: builds MOCA's decoder from the sections ``model`` and ``method``.
        generator: builds a weight generator of MOCA from the sections ``model`` and ``method`` and
            its output width.
        linear: builds a linear layer with bias from its input and output width.
    """

    branch: Callable[..., Any]
    encoder: Callable[[ModelSpec], Encoder]
    head: Callable[[Head], Any]
    set_batch_norm: Callable[[Any, BatchNormSpec, Group], None]
    set_tracking: Callable[[Any, bool], None]
    queue: Callable[[QueueSpec], Memory]
    codebook: Callable[[VitSpec, MocaSpec], Codebook]
    decoder: Callable[[VitSpec, MocaSpec], Any]
    generator: Callable[[VitSpec, MocaSpec, int], Any]
    linear: Callable[[int, int], Any]


def _shared_by(spec: BatchNormSpec, count: int) -> BatchNormSpec:
    """The section of one of ``count`` equal parts of a batch."""
    return spec.model_copy(update={"virtual_ranks": max(1, spec.virtual_ranks // count)})


class Branches:
    """A student and a teacher that follows it. The paths of all tensors are canonical names.

    Implements ``core.contracts.Model``. A backend's class provides the parts and, at the end of
    this class, what its framework does in its own way.

    Args:
        student: has all parameters of the teacher under the same names, and may have more.
        teacher: gets no gradients. None: there is no teacher.

    Attributes:
        kit: parts of the framework.
        student: ``Branch`` with an ``encoder``, which is a ``core.contracts.Encoder``.
        teacher: likewise; None: the method has no teacher.
        statistics: what the running statistics of the teacher's batch norms are. own: those of its
            own batches. averaged: moving averages of the student's, like the weights. copied: the
            student's.
    """

    kit: Kit
    statistics: TeacherStatistics = "own"
    student: Any
    teacher: Any

    def __init__(self, student: Any, teacher: Any = None) -> None:
        super().__init__()  # of the framework's module class
        self.student, self.teacher = student, teacher
        if teacher is not None:
            self.freeze(teacher)

    @classmethod
    def branch(cls, spec: RunSpec, ranks: Ranks, *, predictor: bool) -> Any:
        """Builds a branch of MoCo: an encoder, a projector and, if wanted, a predictor."""
        parts = parameters.parts(spec)
        heads = {"projector": parts.projector}
        if predictor:
            heads["predictor"] = parts.predictor
        built = {name: cls.kit.head(head) for name, head in heads.items()}
        branch = cls.kit.branch(encoder=cls.kit.encoder(spec.model), **built)
        cls.set_batch_norm(branch, spec, ranks)
        return branch

    @classmethod
    def set_batch_norm(cls, branch: Any, spec: RunSpec, ranks: Ranks) -> None:
        """Sets the batch norms. The encoder sees a micro-batch, the heads all images of a copy."""
        copies = ranks.replicas.count
        cls.kit.set_batch_norm(branch, _shared_by(spec.batch_norm, copies), ranks.norms)
        of_part = _shared_by(spec.batch_norm, copies * spec.train.accumulate)
        cls.kit.set_batch_norm(branch.encoder, of_part, ranks.norms)

    def compute(self, part: Callable[..., Any], *arguments: Any) -> Any:
        """The output of a part of the networks, computed in the precision of the run.

        A backend with mixed precision overrides this method. The rest of a step never uses mixed
        precision: the output is float32, or float64 if that is the precision of the run.
        """
        return part(*arguments)

    def encoded(self, branch: str, view: Tensor) -> Tensor:
        """See ``core.contracts.Model``."""
        return self.compute(getattr(self, branch).encoder, view)

    def projected(self, branch: str, features: Tensor) -> Tensor:
        """See ``core.contracts.Model``."""
        return self.compute(getattr(self, branch).projected, features)

    def features(
        self, branch: str, images: Tensor, layers: Sequence[int], *, projection: bool, whole: bool
    ) -> dict[str, Tensor]:
        """See ``core.contracts.Networks``."""
        module = getattr(self, branch)
        module.eval()
        if whole:
            features: dict[str, Tensor] = dict(module.encoder.tokens(images, layers))
        else:
            features = {"final": module.encoder(images).unsqueeze(1)}
        if projection:
            features["projection"] = module.projector(features["final"][:, 0])
        module.train()
        return features

    def attention(self, branch: str, images: Tensor) -> Tensor:
        """See ``core.contracts.Networks``."""
        module = getattr(self, branch)
        module.eval()
        weights = module.encoder.class_attention(images)
        module.train()
        return weights

    def counters(self) -> dict[str, Slot]:
        """See ``core.contracts.Networks``."""
        memory = getattr(self, "memory", None)
        names: Sequence[str] = getattr(memory, "counters", ())
        return {f"memory.{name}": Slot.counter(memory, name) for name in names}

    def track(self, branch: str, flag: bool) -> None:
        """See ``core.contracts.Networks``."""
        self.kit.set_tracking(getattr(self, branch), flag)

    def update_teacher(self, momentum: float) -> None:
        """See ``core.contracts.Model``."""
        raise NotImplementedError

    @staticmethod
    def freeze(module: Any) -> None:
        """Takes the gradients from all parameters of a module."""
        raise NotImplementedError

    @staticmethod
    def indices(index: Index, like: Tensor) -> Tensor:
        """Copies an index to the device of a tensor, unless it is there."""
        raise NotImplementedError

    @staticmethod
    def concat(parts: list[Tensor]) -> Tensor:
        """Concatenates tensors (N, D) along their second axis."""
        raise NotImplementedError
