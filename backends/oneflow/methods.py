"""The methods' modules: student, teacher and how one is moved towards the other."""

import numpy as np
import oneflow as flow
from oneflow import Tensor, nn

from triptych.backends.oneflow import flat, heads
from triptych.backends.oneflow.encoders import encoder
from triptych.backends.oneflow.layers import set_virtual_ranks
from triptych.backends.oneflow.memory import Codebook, Queue
from triptych.backends.oneflow.moca import MocaStudent, MocaTeacher
from triptych.core.config.spec import OptimSpec, RunSpec
from triptych.core.contracts import Array
from triptych.core.optim import groups


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
    """``core.contracts.Model``: a student and a teacher that follows it; paths are canonical names.

    Args:
        student: has all that the teacher has, and may have more.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        super().__init__()
        self.student = student
        self.teacher = teacher.requires_grad_(False)

    def pack(self, spec: OptimSpec) -> tuple[Tensor, list[str]]:
        """Moves student and teacher into one buffer each (see ``flat.pack``).

        Returns:
            The part of the student's that is trained, and the names of what lies there: groups of
            the optimizer lie together.
        """
        student = dict(self.student.named_parameters())
        teacher = dict(self.teacher.named_parameters())

        def place(name: str) -> tuple[bool, bool, groups.Group]:
            parameter = student[name]
            group = groups.group(f"student.{name}", parameter.ndim, spec)
            return name not in teacher, parameter.requires_grad, group

        # What both have comes first, in one order; of it what is frozen. What only the student has
        # and is frozen stays where it is.
        free = [name for name, parameter in student.items() if parameter.requires_grad]
        order = sorted({**teacher, **dict.fromkeys(free)}, key=place)
        values = flat.pack(self.student, order)
        targets = flat.pack(self.teacher, [name for name in order if name in teacher])
        sources = flat.blocks(values[: targets.numel()])
        self._blocks = list(zip(flat.blocks(targets), sources, strict=True))
        frozen = sum(student[name].numel() for name in order if name not in free)
        return values[frozen:], [f"student.{name}" for name in order if name in free]

    def query(self, view: Tensor) -> Tensor:
        """See ``core.contracts.Model``."""
        return self.student(view)

    def key(self, view: Tensor) -> Tensor:
        """See ``core.contracts.Model``."""
        return self.teacher(view)

    @flow.no_grad()
    def update_teacher(self, momentum: float) -> None:
        """See ``core.contracts.Model``."""
        # As a difference: what is equal in both stays so to the last bit. In blocks: at once it
        # would take two copies of the model, beside the activations of the student.
        for target, source in self._blocks:
            target.add_(source - target, alpha=1.0 - momentum)


class MoCo(Pair):
    """``core.contracts.QueueModel`` of MoCo v1 and v2."""

    def __init__(self, spec: RunSpec) -> None:
        super().__init__(Branch(spec, predictor=False), Branch(spec, predictor=False))
        self.memory = Queue(spec.method)


class MoCoV3(Pair):
    """``core.contracts.Model`` of MoCo v3."""

    def __init__(self, spec: RunSpec) -> None:
        super().__init__(Branch(spec, predictor=True), Branch(spec, predictor=False))


class MOCA(Pair):
    """``core.contracts.MocaModel``."""

    def __init__(self, spec: RunSpec) -> None:
        super().__init__(MocaStudent(spec), MocaTeacher(spec))
        self.grid, self.early_layer = spec.model.grid, spec.method.early_layer
        self.memory = Codebook(spec)

    def teacher_tokens(self, images: Tensor) -> Tensor:
        """See ``core.contracts.MocaModel``."""
        return self.teacher.encoder.tokens(images)["final"][:, 1:]

    def encode(self, images: Tensor, ids: Array) -> tuple[Tensor, Tensor]:
        """See ``core.contracts.MocaModel``."""
        return self.student.encoder.masked(images, _index(ids, images), self.early_layer)

    def decode(self, image: Tensor, early: Tensor, ids: Array) -> Tensor:
        """See ``core.contracts.MocaModel``."""
        return self.student.decoder(image, early, _index(ids, early))

    def image_weights(self, words: Tensor) -> Tensor:
        """See ``core.contracts.MocaModel``."""
        return self.student.image_predictor(words)

    def dense_weights(self, words: Tensor) -> Tensor:
        """See ``core.contracts.MocaModel``."""
        return self.student.dense_predictor(words)


def _index(ids: Array, like: Tensor) -> Tensor:
    # A copy, since OneFlow reads it later than this returns.
    return flow.from_numpy(np.array(ids, np.int64, order="C")).to(like.device)


METHODS = {"moco_v1": MoCo, "moco_v2": MoCo, "moco_v3": MoCoV3, "moca": MOCA}
