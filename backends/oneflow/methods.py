"""The methods' modules: student, teacher and how one is moved towards the other."""

import oneflow as flow
from oneflow import Tensor, nn

from triptych.backends.oneflow import flat, heads
from triptych.backends.oneflow.encoders import encoder
from triptych.backends.oneflow.layers import set_virtual_ranks
from triptych.backends.oneflow.memory import Queue
from triptych.core.config.spec import RunSpec


class Branch(nn.Module):
    """Encoder and projector, and where asked the predictor. Images (N, C, H, W) -> (N, D)."""

    def __init__(self, spec: RunSpec, *, predictor: bool) -> None:
        super().__init__()
        self.encoder = encoder(spec.model)
        self.projector = heads.projector(spec.model.features, spec.method)
        if predictor:
            self.predictor = heads.predictor(spec.method)
        set_virtual_ranks(self, spec.batch_norm.virtual_ranks)

    def forward(self, images: Tensor) -> Tensor:
        """Projection, and where there is a predictor its prediction."""
        x = self.projector(self.encoder(images))
        return self.predictor(x) if hasattr(self, "predictor") else x


class Pair(nn.Module):
    """``core.engine.Model``: a student, and a teacher that follows it; paths are canonical names.

    Args:
        predictor: whether the student has one.
    """

    def __init__(self, spec: RunSpec, *, predictor: bool) -> None:
        super().__init__()
        self.student = Branch(spec, predictor=predictor)
        self.teacher = Branch(spec, predictor=False).requires_grad_(False)

    def pack(self) -> Tensor:
        """Moves student and teacher into one buffer each (see ``flat.pack``).

        Returns:
            The part of the student's that is trained, in the order of ``named_parameters``.
        """
        student = dict(self.student.named_parameters())
        teacher = dict(self.teacher.named_parameters())
        # What both have comes first, in one order; of it what is frozen.
        order = sorted(student, key=lambda name: (name not in teacher, student[name].requires_grad))
        values = flat.pack(self.student, order)
        targets = flat.pack(self.teacher, [name for name in order if name in teacher])
        sources = flat.blocks(values[: targets.numel()])
        self._blocks = list(zip(flat.blocks(targets), sources, strict=True))
        frozen = sum(p.numel() for p in student.values() if not p.requires_grad)
        return values[frozen:]

    def query(self, view: Tensor) -> Tensor:
        """See ``core.engine.Model``."""
        return self.student(view)

    def key(self, view: Tensor) -> Tensor:
        """See ``core.engine.Model``."""
        return self.teacher(view)

    @flow.no_grad()
    def update_teacher(self, momentum: float) -> None:
        """See ``core.engine.Model``."""
        # As a difference: what is equal in both stays so to the last bit. In blocks: at once it
        # would take two copies of the model, beside the activations of the student.
        for target, source in self._blocks:
            target.add_(source - target, alpha=1.0 - momentum)


class MoCo(Pair):
    """``core.engine.QueueModel`` of MoCo v1 and v2."""

    def __init__(self, spec: RunSpec) -> None:
        super().__init__(spec, predictor=False)
        self.memory = Queue(spec.method)


class MoCoV3(Pair):
    """``core.engine.Model`` of MoCo v3."""

    def __init__(self, spec: RunSpec) -> None:
        super().__init__(spec, predictor=True)


METHODS = {"moco_v1": MoCo, "moco_v2": MoCo, "moco_v3": MoCoV3}
