"""The methods' modules: student, teacher and how one is moved towards the other."""

import numpy as np
import paddle
from paddle import Tensor, nn

from triptych.backends.paddle import heads
from triptych.backends.paddle.encoders import encoder
from triptych.backends.paddle.layers import set_virtual_ranks
from triptych.backends.paddle.memory import Codebook, Queue
from triptych.backends.paddle.moca import MocaStudent, MocaTeacher
from triptych.core.config.spec import RunSpec
from triptych.core.contracts import Array


class Branch(nn.Layer):
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


class Pair(nn.Layer):
    """``core.contracts.Model``: a student and a teacher that follows it; paths are canonical names.

    Args:
        student: has all that the teacher has, and may have more.
    """

    def __init__(self, student: nn.Layer, teacher: nn.Layer) -> None:
        super().__init__()
        self.student, self.teacher = student, teacher
        # Paired by name: the student may have the predictor besides.
        sources = dict(student.named_parameters())
        targets = dict(teacher.named_parameters())
        self._pairs = [(target, sources[name]) for name, target in targets.items()]
        for target in targets.values():
            target.stop_gradient = True

    def query(self, view: Tensor) -> Tensor:
        """See ``core.contracts.Model``."""
        return self.student(view)

    def key(self, view: Tensor) -> Tensor:
        """See ``core.contracts.Model``."""
        return self.teacher(view)

    @paddle.no_grad()
    def update_teacher(self, momentum: float) -> None:
        """See ``core.contracts.Model``."""
        for target, source in self._pairs:
            # As a difference: what is equal in both stays so to the last bit.
            target.add_((source - target).scale_(1.0 - momentum))


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
    return paddle.to_tensor(np.ascontiguousarray(ids), place=like.place)


METHODS = {"moco_v1": MoCo, "moco_v2": MoCo, "moco_v3": MoCoV3, "moca": MOCA}
