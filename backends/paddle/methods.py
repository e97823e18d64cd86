"""The methods' modules: student, teacher and how one is moved towards the other."""

import paddle
from paddle import Tensor, nn

from triptych.backends.paddle import heads
from triptych.backends.paddle.vit import VisionTransformer
from triptych.core.config.spec import RunSpec


class Branch(nn.Layer):
    """Encoder and projector, and in the student the predictor. Images (N, C, H, W) -> (N, D)."""

    def __init__(self, spec: RunSpec, *, predictor: bool) -> None:
        super().__init__()
        self.encoder = VisionTransformer(spec.model)
        self.projector = heads.projector(spec.model.width, spec.method)
        if predictor:
            self.predictor = heads.predictor(spec.method)

    def forward(self, images: Tensor) -> Tensor:
        """Projection, and in the student its prediction."""
        x = self.projector(self.encoder(images))
        return self.predictor(x) if hasattr(self, "predictor") else x


class MoCoV3(nn.Layer):
    """``core.engine.Model`` of MoCo v3; sublayer paths are the canonical names."""

    def __init__(self, spec: RunSpec) -> None:
        super().__init__()
        self.student = Branch(spec, predictor=True)
        self.teacher = Branch(spec, predictor=False)
        # Paired by name: the student has the predictor besides.
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


METHODS = {"moco_v3": MoCoV3}
