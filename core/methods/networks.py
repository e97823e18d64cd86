"""The code of student and teacher that needs no framework.

A backend's class inherits from one of these classes first and from the framework's module class
last. It adds the native code: the parts, and the update of the teacher.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

from triptych.core import parameters
from triptych.core.config.spec import (
    BatchNormSpec,
    FinetuneSpec,
    LinearSpec,
    MocaSpec,
    MocoV3Spec,
    ModelSpec,
    QueueSpec,
    RunSpec,
    TeacherStatistics,
    VitSpec,
)
from triptych.core.contracts import (
    ALONE,
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
        freeze: takes the gradients from all parameters of a module.
        indices: copies an index to the device of a given tensor, unless it is there.
        concat: concatenates tensors (N, D) along their second axis.
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
    freeze: Callable[[Any], None]
    indices: Callable[[Index, Tensor], Tensor]
    concat: Callable[[list[Tensor]], Tensor]


def _shared_by(spec: BatchNormSpec, count: int) -> BatchNormSpec:
    """The section of one of ``count`` equal parts of a batch."""
    return spec.model_copy(update={"virtual_ranks": max(1, spec.virtual_ranks // count)})


class Branches:
    """Implements ``core.contracts.Model`` except for ``update_teacher``.

    Attributes:
        kit: parts of the framework. The backend's class provides them.
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


class MoCo(Branches):
    """``core.contracts.QueueModel`` of MoCo v1 and v2."""

    def __init__(self, spec: RunSpec, ranks: Ranks = ALONE) -> None:
        method = cast(QueueSpec, spec.method)
        super().__init__(*(self.branch(spec, ranks, predictor=False) for _ in range(2)))
        self.statistics = method.teacher_statistics
        self.memory = self.kit.queue(method)


class MoCoV3(Branches):
    """``core.contracts.Model`` of MoCo v3."""

    def __init__(self, spec: RunSpec, ranks: Ranks = ALONE) -> None:
        student, teacher = (self.branch(spec, ranks, predictor=own) for own in (True, False))
        super().__init__(student, teacher)
        self.statistics = cast(MocoV3Spec, spec.method).teacher_statistics


class MOCA(Branches):
    """``core.contracts.MocaModel``."""

    def __init__(self, spec: RunSpec, ranks: Ranks = ALONE) -> None:
        model, method = cast(VitSpec, spec.model), cast(MocaSpec, spec.method)
        kit = self.kit
        student = kit.branch(
            encoder=kit.encoder(model),
            image_predictor=kit.generator(model, method, model.width),
            decoder=kit.decoder(model, method),
            dense_predictor=kit.generator(model, method, method.decoder_width),
        )
        # The generators' batch is the words of the codebook, which are equal on all ranks.
        kit.set_batch_norm(student, spec.batch_norm, ALONE.norms)
        super().__init__(student, kit.branch(encoder=kit.encoder(model)))
        self.grid, self.early_layer = model.grid, method.early_layer
        self.memory = self.kit.codebook(model, method)

    def teacher_tokens(self, images: Tensor) -> Tensor:
        """See ``core.contracts.MocaModel``."""
        return self.compute(self.teacher.encoder.tokens, images)["final"][:, 1:]

    def encode(self, images: Tensor, ids: Index) -> tuple[Tensor, Tensor]:
        """See ``core.contracts.MocaModel``."""
        masked, places = self.student.encoder.masked, self.kit.indices(ids, images)
        early, last = self.compute(masked, images, places, self.early_layer)
        return early, last

    def decode(self, image: Tensor, early: Tensor, ids: Index) -> Tensor:
        """See ``core.contracts.MocaModel``."""
        return self.compute(self.student.decoder, image, early, self.kit.indices(ids, early))

    def image_weights(self, words: Tensor) -> Tensor:
        """See ``core.contracts.MocaModel``."""
        return self.compute(self.student.image_predictor, words)

    def dense_weights(self, words: Tensor) -> Tensor:
        """See ``core.contracts.MocaModel``."""
        return self.compute(self.student.dense_predictor, words)


class Linear(Branches):
    """``core.contracts.LinearModel``."""

    def __init__(self, spec: RunSpec, ranks: Ranks = ALONE) -> None:
        method, kit = cast(LinearSpec, spec.method), self.kit
        width, count = parameters.probe_width(spec), len(method.probes)
        heads = [kit.linear(width, method.classes) for _ in range(count)]
        numbered = {str(i): head for i, head in enumerate(heads)}
        classifier = kit.branch(**numbered) if count > 1 else heads[0]
        encoder = kit.encoder(spec.model)
        kit.freeze(encoder)
        super().__init__(kit.branch(encoder=encoder, classifier=classifier))
        self.pooling, self.cached = method.pooling, method.features == "cached"
        depth = spec.model.depth if isinstance(spec.model, VitSpec) else 1
        self.layers = tuple(range(depth - method.blocks, depth - 1))
        self.count = count

    def frozen(self, images: Tensor) -> Tensor:
        """See ``core.contracts.LinearModel``."""
        self.student.eval()
        return self.compute(self._features, images)

    def _features(self, images: Tensor) -> Tensor:
        encoder = self.student.encoder
        if self.pooling == "cls" and not self.layers:
            return encoder(images)
        tokens = encoder.tokens(images, self.layers)
        if self.pooling == "mean":
            return tokens["final"][:, 1:].mean(1)
        classes = [encoder.norm(tokens[f"layer{i}"])[:, 0] for i in self.layers]
        classes.append(tokens["final"][:, 0])
        if self.pooling == "both":
            classes.append(tokens["final"][:, 1:].mean(1))
        return self.kit.concat(classes)

    def logits(self, features: Tensor) -> list[Tensor]:
        """See ``core.contracts.LinearModel``."""
        classifier = self.student.classifier
        if self.count == 1:
            return [classifier(features)]
        return [getattr(classifier, str(i))(features) for i in range(self.count)]

    def classify(self, branch: str, images: Tensor) -> list[Tensor]:
        """See ``core.contracts.Classifier``."""
        return self.logits(images if images.ndim == 2 else self.frozen(images))


class Finetune(Branches):
    """``core.contracts.FinetuneModel``."""

    def __init__(self, spec: RunSpec, ranks: Ranks = ALONE) -> None:
        method = cast(FinetuneSpec, spec.method)
        averaged = method.momentum is not None
        super().__init__(self.whole(spec, ranks), self.whole(spec, ranks) if averaged else None)
        self.statistics = "averaged" if method.ema_rule == "timm" else "copied"
        self.pooling = method.pooling

    @classmethod
    def whole(cls, spec: RunSpec, ranks: Ranks) -> Any:
        """Builds an encoder with its classifier."""
        classes = cast(FinetuneSpec, spec.method).classes
        classifier = cls.kit.linear(spec.model.features, classes)
        branch = cls.kit.branch(encoder=cls.kit.encoder(spec.model), classifier=classifier)
        cls.set_batch_norm(branch, spec, ranks)
        return branch

    def predict(self, images: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor]:
        """See ``core.contracts.FinetuneModel``."""
        scales: list[tuple[Tensor, Tensor]] = []
        if keep is not None:
            rows = [row[:, None, None] for row in keep]
            scales = list(zip(rows[::2], rows[1::2], strict=True))
        feature, logits = self.compute(self.student.classified, images, self.pooling, scales)
        return feature, logits

    def classify(self, branch: str, images: Tensor) -> list[Tensor]:
        """See ``core.contracts.Classifier``."""
        module = getattr(self, branch)
        module.eval()
        _, logits = self.compute(module.classified, images, self.pooling)
        module.train()
        return [logits]
