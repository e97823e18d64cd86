"""The networks of each method: student, teacher, and the update of the teacher."""

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
    """A student or a teacher (see ``core.methods.networks.Branch``)."""


def _indices(ids: Array, like: Tensor) -> Tensor:
    return paddle.to_tensor(np.ascontiguousarray(ids), place=like.place)


KIT = networks.Kit(
    Branch, encoder, head, set_virtual_ranks, Queue, Codebook, Decoder, Generator, _indices
)


class Pair(networks.Branches, nn.Layer):
    """A student and a teacher that follows it. The paths of all tensors are canonical names.

    Args:
        student: has all parameters of the teacher under the same names, and may have more.
        teacher: gets no gradients.
    """

    kit = KIT

    def __init__(self, student: nn.Layer, teacher: nn.Layer) -> None:
        super().__init__(student, teacher)
        # Paired by name, since the student may have a predictor, too.
        sources = dict(student.named_parameters())
        targets = dict(teacher.named_parameters())
        self._pairs = [(target, sources[name]) for name, target in targets.items()]
        for target in targets.values():
            target.stop_gradient = True

    @paddle.no_grad()
    def update_teacher(self, momentum: float) -> None:
        """See ``core.contracts.Model``."""
        for target, source in self._pairs:
            # The difference keeps values that are equal in both exactly equal.
            target.add_((source - target).scale_(1.0 - momentum))


class MoCo(networks.MoCo, Pair):
    """Implements ``core.contracts.QueueModel`` for MoCo v1 and v2."""


class MoCoV3(networks.MoCoV3, Pair):
    """Implements ``core.contracts.Model`` for MoCo v3."""


class MOCA(networks.MOCA, Pair):
    """Implements ``core.contracts.MocaModel``."""


Build = Callable[[RunSpec], Pair]
METHODS: dict[str, Build] = {"moco_v1": MoCo, "moco_v2": MoCo, "moco_v3": MoCoV3, "moca": MOCA}

_MOCO: type[QueueModel] = MoCo
_MOCO_V3: type[Model] = MoCoV3
_MOCA: type[MocaModel] = MOCA
