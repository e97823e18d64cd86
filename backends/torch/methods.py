"""The methods' modules: student, teacher and how one is moved towards the other."""

import torch
from torch import Tensor, nn

from triptych.backends.torch import heads
from triptych.backends.torch.vit import VisionTransformer
from triptych.core.config.spec import RunSpec


class Branch(nn.Module):
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


class MoCoV3(nn.Module):
    """``core.engine.Model`` of MoCo v3; module paths are the canonical names."""

    def __init__(self, spec: RunSpec) -> None:
        super().__init__()
        self.student = Branch(spec, predictor=True)
        self.teacher = Branch(spec, predictor=False).requires_grad_(False)
        # Paired by name: the student has the predictor besides.
        student = dict(self.student.named_parameters())
        self._targets = list(self.teacher.parameters())
        self._sources = [student[name] for name, _ in self.teacher.named_parameters()]

    def query(self, view: Tensor) -> Tensor:
        """See ``core.engine.Model``."""
        return self.student(view)

    def key(self, view: Tensor) -> Tensor:
        """See ``core.engine.Model``."""
        return self.teacher(view)

    @torch.no_grad()
    def update_teacher(self, momentum: float) -> None:
        """See ``core.engine.Model``."""
        torch._foreach_lerp_(self._targets, self._sources, 1.0 - momentum)


METHODS = {"moco_v3": MoCoV3}
