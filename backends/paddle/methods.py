"""The methods' modules: student, teacher and how one is moved towards the other."""

import paddle
from paddle import Tensor, nn

from triptych.backends.paddle import heads
from triptych.backends.paddle.encoders import encoder
from triptych.backends.paddle.layers import set_virtual_ranks
from triptych.backends.paddle.memory import Queue
from triptych.core.config.spec import RunSpec


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
    """``core.engine.Model``: a student, and a teacher that follows it; paths are canonical names.

    Args:
        predictor: whether the student has one.
    """

    def __init__(self, spec: RunSpec, *, predictor: bool) -> None:
        super().__init__()
        self.student = Branch(spec, predictor=predictor)
        self.teacher = Branch(spec, predictor=False)
        # Paired by name: the student may have the predictor besides.
        student = dict(self.student.named_parameters())
        teacher = dict(self.teacher.named_parameters())
        self._pairs = [(target, student[name]) for name, target in teacher.items()]
        for target in teacher.values():
            target.stop_gradient = True

    def query(self, view: Tensor) -> Tensor:
        """See ``core.engine.Model``."""
        return self.student(view)

    def key(self, view: Tensor) -> Tensor:
        """See ``core.engine.Model``."""
        return self.teacher(view)

    @paddle.no_grad()
    def update_teacher(self, momentum: float) -> None:
        """See ``core.engine.Model``."""
        for target, source in self._pairs:
            # As a difference: what is equal in both stays so to the last bit.
            target.add_((source - target).scale_(1.0 - momentum))


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
