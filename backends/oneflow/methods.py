"""The networks of each method: student, teacher, and the update of the teacher."""

import numpy as np
import oneflow as flow
from oneflow import Tensor, nn

from triptych.backends.oneflow import flat, layers
from triptych.backends.oneflow.encoders import encoder
from triptych.backends.oneflow.heads import head
from triptych.backends.oneflow.memory import Codebook, Queue
from triptych.backends.oneflow.moca import Decoder, Generator
from triptych.backends.oneflow.products import Linear
from triptych.core.config.spec import RunSpec
from triptych.core.contracts import Index
from triptych.core.methods import models, networks
from triptych.core.optim import groups


class Branch(networks.Branch, nn.Module):
    """A student or a teacher (see ``core.methods.networks.Branch``)."""


KIT = networks.Kit(
    branch=Branch,
    encoder=encoder,
    head=head,
    set_batch_norm=layers.set_batch_norm,
    set_tracking=layers.set_tracking,
    queue=Queue,
    codebook=Codebook,
    decoder=Decoder,
    generator=Generator,
    linear=Linear,
)


class Pair(networks.Branches, nn.Module):
    """A student and a teacher (see ``core.methods.networks.Branches``)."""

    kit = KIT

    def __init__(self, student: nn.Module, teacher: nn.Module | None = None) -> None:
        super().__init__(student, teacher)
        self._blocks: list[tuple[Tensor, Tensor]] = []

    def pack(self, spec: RunSpec) -> tuple[Tensor, list[str]]:
        """Moves the parameters of student and teacher into one buffer each (see ``flat.pack``).

        Returns:
            The trained part of the student's buffer, and the names of the parameters in it. The
            parameters of one optimizer group are contiguous.
        """
        student = dict(self.student.named_parameters())
        teacher = dict(self.teacher.named_parameters()) if self.teacher is not None else {}

        def place(name: str) -> tuple[bool, bool, tuple[bool, bool, float, float]]:
            parameter = student[name]
            group = groups.group(f"student.{name}", parameter.ndim, spec)
            return name not in teacher, parameter.requires_grad, group.order

        # The student's buffer holds, in this order:
        #   1. frozen parameters that the teacher has too,
        #   2. trained parameters that the teacher has too,
        #   3. trained parameters of the student only.
        # The teacher's buffer holds 1 and 2. Frozen parameters of the student only are not packed.
        free = [name for name, parameter in student.items() if parameter.requires_grad]
        order = sorted({**teacher, **dict.fromkeys(free)}, key=place)
        values = flat.pack(self.student, order)
        if self.teacher is not None:
            targets = flat.pack(self.teacher, [name for name in order if name in teacher])
            sources = flat.blocks(values[: targets.numel()])
            self._blocks = list(zip(flat.blocks(targets), sources, strict=True))
        frozen = sum(student[name].numel() for name in order if name not in free)
        return values[frozen:], [f"student.{name}" for name in order if name in free]

    @flow.no_grad()
    def update_teacher(self, momentum: float) -> None:
        """See ``core.contracts.Model``."""
        # The difference keeps values that are equal in both exactly equal. The blocks save memory:
        # one update of all would take two copies of the model beside the student's activations.
        for target, source in self._blocks:
            target.add_(source - target, alpha=1.0 - momentum)
        if self.statistics != "own":
            self._update_statistics(momentum)

    def _update_statistics(self, momentum: float) -> None:
        """Averages or copies the running statistics of the teacher's batch norms."""
        followed = () if self.teacher is None else self.teacher.named_buffers()
        sources = dict(self.student.named_buffers())
        for name, target in followed:
            if self.statistics == "copied":
                target.copy_(sources[name])
            elif target.is_floating_point():
                target.add_(sources[name] - target, alpha=1.0 - momentum)

    @staticmethod
    def freeze(module: nn.Module) -> None:
        """See ``core.methods.networks.Branches``."""
        module.requires_grad_(False)

    @staticmethod
    def indices(index: Index, like: Tensor) -> Tensor:
        """See ``core.methods.networks.Branches``."""
        if not isinstance(index, np.ndarray):
            return index
        # A copy, since OneFlow may read the array after this function has returned.
        return flow.from_numpy(np.array(index, order="C")).to(like.device)

    @staticmethod
    def concat(parts: list[Tensor]) -> Tensor:
        """See ``core.methods.networks.Branches``."""
        return flow.cat(parts, dim=1)


METHODS = models.complete(Pair)
