"""The methods' modules: student, teacher and how one is moved towards the other."""

from collections.abc import Callable

import numpy as np
import paddle
from paddle import Tensor, nn

from triptych.backends.paddle.encoders import encoder
from triptych.backends.paddle.heads import head
from triptych.backends.paddle.layers import set_virtual_ranks
from triptych.backends.paddle.memory import Codebook, Queue
from triptych.backends.paddle.moca import Decoder, Generator
from triptych.core.config.spec import RunSpec
from triptych.core.contracts import Array, MocaModel, Model, QueueModel
from triptych.core.methods import networks


class Branch(networks.Branch, nn.Layer):
    """A student or a teacher, see ``core.methods.networks.Branch``."""


def _indices(ids: Array, like: Tensor) -> Tensor:
    return paddle.to_tensor(np.ascontiguousarray(ids), place=like.place)


KIT = networks.Kit(
    Branch, encoder, head, set_virtual_ranks, Queue, Codebook, Decoder, Generator, _indices
)


class Pair(networks.Branches, nn.Layer):
    """``core.contracts.Model``: a student and a teacher that follows it; paths are canonical names.

    Args:
        student: has all that the teacher has, and may have more.
    """

    kit = KIT

    def __init__(self, student: nn.Layer, teacher: nn.Layer) -> None:
        super().__init__(student, teacher)
        # Paired by name: the student may have the predictor besides.
        sources = dict(student.named_parameters())
        targets = dict(teacher.named_parameters())
        self._pairs = [(target, sources[name]) for name, target in targets.items()]
        for target in targets.values():
            target.stop_gradient = True

    @paddle.no_grad()
    def update_teacher(self, momentum: float) -> None:
        """See ``core.contracts.Model``."""
        for target, source in self._pairs:
            # As a difference: what is equal in both stays so to the last bit.
            target.add_((source - target).scale_(1.0 - momentum))


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
