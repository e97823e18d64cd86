"""The networks of each method: student, teacher, and the update of the teacher."""

from collections.abc import Callable

import numpy as np
import oneflow as flow
from oneflow import Tensor, nn

from triptych.backends.oneflow import flat, layers
from triptych.backends.oneflow.encoders import encoder
from triptych.backends.oneflow.heads import head
from triptych.backends.oneflow.memory import Codebook, Queue
from triptych.backends.oneflow.moca import Decoder, Generator
from triptych.core.config.spec import RunSpec
from triptych.core.contracts import (
    FinetuneModel,
    Index,
    LinearModel,
    MocaModel,
    Model,
    QueueModel,
    Ranks,
)
from triptych.core.methods import networks
from triptych.core.optim import groups


class Branch(networks.Branch, nn.Module):
    """A student or a teacher (see ``core.methods.networks.Branch``)."""


def _freeze(module: nn.Module) -> None:
    module.requires_grad_(False)


def _indices(index: Index, like: Tensor) -> Tensor:
    if not isinstance(index, np.ndarray):
        return index
    # A copy, since OneFlow may read the array after this function has returned.
    return flow.from_numpy(np.array(index, order="C")).to(like.device)


def _concat(parts: list[Tensor]) -> Tensor:
    return flow.cat(parts, dim=1)


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
    linear=layers.Linear,
    freeze=_freeze,
    indices=_indices,
    concat=_concat,
)


class Pair(networks.Branches, nn.Module):
    """A student and a teacher that follows it. The paths of all tensors are canonical names.

    Args:
        student: has all parameters of the teacher under the same names, and may have more.
        teacher: gets no gradients. None: there is no teacher.
    """

    kit = KIT

    def __init__(self, student: nn.Module, teacher: nn.Module | None = None) -> None:
        super().__init__(student, teacher)
        if teacher is not None:
            teacher.requires_grad_(False)
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


class MoCo(networks.MoCo, Pair):
    """Implements ``core.contracts.QueueModel`` for MoCo v1 and v2."""


class MoCoV3(networks.MoCoV3, Pair):
    """Implements ``core.contracts.Model`` for MoCo v3."""


class MOCA(networks.MOCA, Pair):
    """Implements ``core.contracts.MocaModel``."""


class Linear(networks.Linear, Pair):
    """Implements ``core.contracts.LinearModel``."""


class Finetune(networks.Finetune, Pair):
    """Implements ``core.contracts.FinetuneModel``."""


Build = Callable[[RunSpec, Ranks], Pair]
METHODS: dict[str, Build] = {
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
