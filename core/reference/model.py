"""The networks of every method in NumPy: student, teacher and memory."""

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import autograd.numpy as np
from autograd.tracer import getval

from triptych.core import parameters
from triptych.core.config.spec import (
    FinetuneSpec,
    LinearSpec,
    MocoV3Spec,
    QueueSpec,
    RunSpec,
    TeacherStatistics,
    VitSpec,
)
from triptych.core.contracts import (
    ALONE,
    FinetuneModel,
    LinearModel,
    MocaModel,
    Model,
    QueueModel,
    Ranks,
    Slot,
    Tensor,
)
from triptych.core.methods import ring
from triptych.core.reference.encoders import class_attention, encode, pooled
from triptych.core.reference.layers import EVALUATION, Norms, head, layer_norm, linear
from triptych.core.reference.moca import Codebook, Moca


class Pair:
    """Student and teacher: implements ``core.contracts.Model``.

    Args:
        spec: of the run.
        values: every tensor by its canonical name.
        ranks: the processes that train together.

    Attributes:
        statistics: as in ``core.methods.networks.Branches``.
    """

    statistics: TeacherStatistics = "own"

    def __init__(self, spec: RunSpec, values: dict[str, Tensor], ranks: Ranks = ALONE) -> None:
        self.spec, self.values = spec, values
        self._parts = parameters.parts(spec)
        copies, branches = ranks.replicas.count, ("student", "teacher")
        norms = Norms.of(spec.batch_norm, copies, ranks.norms)
        self.head_norms = dict.fromkeys(branches, norms)
        norms = Norms.of(spec.batch_norm, copies * spec.train.accumulate, ranks.norms)
        self.encoder_norms = dict.fromkeys(branches, norms)
        followed = [p for p in parameters.table(spec) if p.name.startswith("teacher.")]
        self._teacher = [p.name for p in followed if not p.buffer]
        self._statistics = [p.name for p in followed if p.buffer]

    def encoded(self, branch: str, view: Tensor) -> Tensor:
        """See ``core.contracts.Model``."""
        model, norms = self.spec.model, self.encoder_norms[branch]
        return encode(self.values, f"{branch}.encoder", view, model, norms)["final"][:, 0]

    def projected(self, branch: str, features: Tensor) -> Tensor:
        """See ``core.contracts.Model``."""
        plans = {"projector": self._parts.projector}
        if branch == "student":
            plans["predictor"] = self._parts.predictor
        for name, plan in plans.items():
            features = head(
                self.values, f"{branch}.{name}", features, plan, self.head_norms[branch]
            )
        return features

    def track(self, branch: str, flag: bool) -> None:
        """See ``core.contracts.Networks``."""
        for norms in (self.encoder_norms, self.head_norms):
            norms[branch] = replace(norms[branch], tracking=flag)

    def update_teacher(self, momentum: float) -> None:
        """See ``core.contracts.Model``."""
        for name in self._teacher:
            source = getval(self.values[name.replace("teacher.", "student.", 1)])
            self.values[name] = momentum * self.values[name] + (1.0 - momentum) * source
        if self.statistics != "own":
            self._update_statistics(momentum)

    def _update_statistics(self, momentum: float) -> None:
        """Averages or copies the running statistics of the teacher's batch norms."""
        for name in self._statistics:
            source = self.values[name.replace("teacher.", "student.", 1)]
            if self.statistics == "copied":
                self.values[name] = np.array(source)
            elif not name.endswith("num_batches_tracked"):
                self.values[name] = momentum * self.values[name] + (1.0 - momentum) * source

    def features(
        self, branch: str, images: Tensor, layers: Sequence[int], *, projection: bool, whole: bool
    ) -> dict[str, Tensor]:
        """See ``core.contracts.Networks``."""
        tokens = encode(self.values, f"{branch}.encoder", images, self.spec.model, EVALUATION)
        features = {name: tokens[name] for name in ("final", *(f"layer{i}" for i in layers))}
        if projection:
            plan, x = self._parts.projector, tokens["final"][:, 0]
            features["projection"] = head(self.values, f"{branch}.projector", x, plan, EVALUATION)
        return features

    def attention(self, branch: str, images: Tensor) -> Tensor:
        """See ``core.contracts.Networks``."""
        model = cast(VitSpec, self.spec.model)
        return class_attention(self.values, f"{branch}.encoder", images, model)

    def counters(self) -> dict[str, Slot]:
        """None: ``values`` holds the counters as tensors."""
        return {}


class MoCo(Pair):
    """``core.contracts.QueueModel`` of MoCo v1 and v2."""

    def __init__(self, spec: RunSpec, values: dict[str, Tensor], ranks: Ranks = ALONE) -> None:
        super().__init__(spec, values, ranks)
        self.statistics = cast(QueueSpec, spec.method).teacher_statistics
        self.memory = Queue(values)


class MoCoV3(Pair):
    """``core.contracts.Model`` of MoCo v3."""

    def __init__(self, spec: RunSpec, values: dict[str, Tensor], ranks: Ranks = ALONE) -> None:
        super().__init__(spec, values, ranks)
        self.statistics = cast(MocoV3Spec, spec.method).teacher_statistics


class MOCA(Moca, Pair):
    """``core.contracts.MocaModel``."""

    def __init__(self, spec: RunSpec, values: dict[str, Tensor], ranks: Ranks = ALONE) -> None:
        Pair.__init__(self, spec, values, ranks)
        Moca.__init__(self, spec, values)
        self.memory = Codebook(values)


class Linear(Pair):
    """``core.contracts.LinearModel``."""

    def frozen(self, images: Tensor) -> Tensor:
        """See ``core.contracts.LinearModel``."""
        method, model, name = cast(LinearSpec, self.spec.method), self.spec.model, "student.encoder"
        tokens = encode(self.values, name, images, model, EVALUATION)
        features = []
        if method.pooling != "mean" and isinstance(model, VitSpec):
            for i in range(model.depth - method.blocks, model.depth - 1):
                x, eps = tokens[f"layer{i}"], model.layer_norm_eps
                features.append(layer_norm(self.values, f"{name}.norm", x, eps)[:, 0])
        if method.pooling != "mean":
            features.append(tokens["final"][:, 0])
        if method.pooling != "cls":
            features.append(np.mean(tokens["final"][:, 1:], axis=1))
        return np.concatenate(features, axis=1)

    def logits(self, features: Tensor) -> list[Tensor]:
        """See ``core.contracts.LinearModel``."""
        count, name = len(cast(LinearSpec, self.spec.method).probes), "student.classifier"
        names = [name] if count == 1 else [f"{name}.{i}" for i in range(count)]
        return [linear(self.values, each, features) for each in names]

    def classify(self, branch: str, images: Tensor) -> list[Tensor]:
        """See ``core.contracts.Classifier``."""
        return self.logits(images if images.ndim == 2 else self.frozen(images))


class Finetune(Pair):
    """``core.contracts.FinetuneModel``."""

    def __init__(self, spec: RunSpec, values: dict[str, Tensor], ranks: Ranks = ALONE) -> None:
        super().__init__(spec, values, ranks)
        rule = cast(FinetuneSpec, spec.method).ema_rule
        self.statistics = "averaged" if rule == "timm" else "copied"

    def predict(self, images: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor]:
        """See ``core.contracts.FinetuneModel``."""
        rows = [] if keep is None else [row[:, None, None] for row in keep]
        scales = list(zip(rows[::2], rows[1::2], strict=True))
        return self._classified("student", images, self.encoder_norms["student"], scales)

    def classify(self, branch: str, images: Tensor) -> list[Tensor]:
        """See ``core.contracts.Classifier``."""
        return [self._classified(branch, images, EVALUATION, [])[1]]

    def _classified(
        self, branch: str, images: Tensor, norms: Norms, scales: Sequence[Sequence[Tensor]]
    ) -> tuple[Tensor, Tensor]:
        values, name = self.values, f"{branch}.encoder"
        pooling = cast(FinetuneSpec, self.spec.method).pooling
        feature = pooled(values, name, images, self.spec.model, pooling, norms, scales)
        return feature, linear(values, f"{branch}.classifier", feature)


class Queue:
    """Implements ``core.contracts.Memory`` with the tensors under ``memory.``."""

    enqueue = ring.enqueue

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

    @pointer.setter
    def pointer(self, column: int) -> None:
        """See ``core.contracts.Memory``."""
        self._values["memory.pointer"] = np.array(column)


METHODS: dict[str, type[Pair]] = {
    "moco_v1": MoCo,
    "moco_v2": MoCo,
    "moco_v3": MoCoV3,
    "moca": MOCA,
    "linear": Linear,
    "finetune": Finetune,
}

_MOCO: type[QueueModel] = MoCo
_MOCO_V3: type[Model] = MoCoV3
_MOCA: type[MocaModel] = MOCA
_LINEAR: type[LinearModel] = Linear
_FINETUNE: type[FinetuneModel] = Finetune
