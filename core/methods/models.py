"""The networks of each method. A backend completes the classes here with its native code."""

from collections.abc import Callable
from typing import Any, TypeVar, cast

from triptych.core import parameters
from triptych.core.config.spec import (
    FinetuneSpec,
    LinearSpec,
    MocaSpec,
    MocoV3Spec,
    QueueSpec,
    RunSpec,
    VitSpec,
)
from triptych.core.contracts import (
    ALONE,
    FinetuneModel,
    Index,
    LinearModel,
    MocaModel,
    Model,
    QueueModel,
    Ranks,
    Tensor,
)
from triptych.core.methods.networks import Branches

Pair = TypeVar("Pair", bound=Branches)
"""A backend's class of student and teacher."""


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
        masked, places = self.student.encoder.masked, self.indices(ids, images)
        early, last = self.compute(masked, images, places, self.early_layer)
        return early, last

    def decode(self, image: Tensor, early: Tensor, ids: Index) -> Tensor:
        """See ``core.contracts.MocaModel``."""
        return self.compute(self.student.decoder, image, early, self.indices(ids, early))

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
        self.freeze(encoder)
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
        return self.concat(classes)

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


METHODS: dict[str, type[Branches]] = {
    "moco_v1": MoCo,
    "moco_v2": MoCo,
    "moco_v3": MoCoV3,
    "moca": MOCA,
    "linear": Linear,
    "finetune": Finetune,
}
"""Name of a method -> class of its networks."""


def complete(pair: type[Pair]) -> dict[str, Callable[[RunSpec, Ranks], Pair]]:
    """The networks of each method on a backend, as module classes of its framework.

    Args:
        pair: the backend's student and teacher.

    Returns:
        By name of the method, a class that inherits from the method's class and from ``pair``.
    """
    made: dict[str, Any] = {}
    for name, own in METHODS.items():
        made[name] = type(own.__name__, (own, pair), {"__module__": pair.__module__})
    return made


_MOCO: type[QueueModel] = MoCo
_MOCO_V3: type[Model] = MoCoV3
_MOCA: type[MocaModel] = MOCA
_LINEAR: type[LinearModel] = Linear
_FINETUNE: type[FinetuneModel] = Finetune
