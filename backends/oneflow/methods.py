"""The methods' modules: student, teacher and how one is moved towards the other."""

from collections.abc import Callable

import numpy as np
import oneflow as flow
from oneflow import Tensor, nn

from triptych.backends.oneflow import flat
from triptych.backends.oneflow.encoders import encoder
from triptych.backends.oneflow.heads import head
from triptych.backends.oneflow.layers import set_virtual_ranks
from triptych.backends.oneflow.memory import Codebook, Queue
from triptych.backends.oneflow.moca import Decoder, Generator
from triptych.core.config.spec import OptimSpec, RunSpec
from triptych.core.contracts import Array, MocaModel, Model, QueueModel
from triptych.core.methods import networks
from triptych.core.optim import groups


class Branch(networks.Branch, nn.Module):
    """A student or a teacher, see ``core.methods.networks.Branch``."""


def _indices(ids: Array, like: Tensor) -> Tensor:
    # A copy, since OneFlow reads it later than this returns.
    return flow.from_numpy(np.array(ids, np.int64, order="C")).to(like.device)


KIT = networks.Kit(
    Branch, encoder, head, set_virtual_ranks, Queue, Codebook, Decoder, Generator, _indices
)


class Pair(networks.Branches, nn.Module):
    """``core.contracts.Model``: a student and a teacher that follows it; paths are canonical names.

    Args:
        student: has all that the teacher has, and may have more.
    """

    kit = KIT

    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        super().__init__(student, teacher)
        teacher.requires_grad_(False)

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

    @flow.no_grad()
    def update_teacher(self, momentum: float) -> None:
        """See ``core.contracts.Model``."""
        # As a difference: what is equal in both stays so to the last bit. In blocks: at once it
        # would take two copies of the model, beside the activations of the student.
        for target, source in self._blocks:
            target.add_(source - target, alpha=1.0 - momentum)


class MoCo(networks.MoCo, Pair):
    """``core.contracts.QueueModel`` of MoCo v1 and v2."""


class MoCoV3(networks.MoCoV3, Pair):
    """``core.contracts.Model`` of MoCo v3."""


class MOCA(networks.MOCA, Pair):
    """``core.contracts.MocaModel``."""


METHODS: dict[str, Callable[[RunSpec], Pair]] = {
    "moco_v1": MoCo,
    "moco_v2": MoCo,
    "moco_v3": MoCoV3,
    "moca": MOCA,
}

_MOCO: type[QueueModel] = MoCo
_MOCO_V3: type[Model] = MoCoV3
_MOCA: type[MocaModel] = MOCA
