"""The networks of each method: student, teacher, and the update of the teacher."""

from collections.abc import Callable

import numpy as np
import paddle
from paddle import Tensor, nn

from triptych.backends.paddle import layers
from triptych.backends.paddle.encoders import encoder
from triptych.backends.paddle.heads import head
from triptych.backends.paddle.memory import Codebook, Queue
from triptych.backends.paddle.moca import Decoder, Generator
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


class Branch(networks.Branch, nn.Layer):
    """A student or a teacher (see ``core.methods.networks.Branch``)."""


def _freeze(module: nn.Layer) -> None:
    for parameter in module.parameters():
        parameter.stop_gradient = True


def _indices(index: Index, like: Tensor) -> Tensor:
    if isinstance(index, Tensor):
        return index
    return paddle.to_tensor(np.ascontiguousarray(index), place=like.place)


def _concat(parts: list[Tensor]) -> Tensor:
    return paddle.concat(parts, axis=1)


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


class Pair(networks.Branches, nn.Layer):
    """A student and a teacher that follows it. The paths of all tensors are canonical names.

    Args:
        student: has all parameters of the teacher under the same names, and may have more.
        teacher: gets no gradients. None: there is no teacher.
    """

    kit = KIT

    def __init__(self, student: nn.Layer, teacher: nn.Layer | None = None) -> None:
        super().__init__(student, teacher)
        if teacher is not None:
            _freeze(teacher)
        self.follow()

    def follow(self) -> None:
        """Finds the parameters that the teacher has, and those of the student that they follow."""
        # Paired by name, since the student may have a predictor, too.
        sources = dict(self.student.named_parameters())
        targets = {} if self.teacher is None else dict(self.teacher.named_parameters())
        self._pairs = [(target, sources[name]) for name, target in targets.items()]

    @paddle.no_grad()
    def update_teacher(self, momentum: float) -> None:
        """See ``core.contracts.Model``."""
        for target, source in self._pairs:
            # The difference keeps values that are equal in both exactly equal.
            target.add_((source - target).scale_(1.0 - momentum))
        if self.statistics != "own":
            self._update_statistics(momentum)

    def _update_statistics(self, momentum: float) -> None:
        """Averages or copies the running statistics of the teacher's batch norms."""
        followed = () if self.teacher is None else self.teacher.named_buffers()
        sources = dict(self.student.named_buffers())
        for name, target in followed:
            if self.statistics == "copied":
                paddle.assign(sources[name], target)
            elif target.is_floating_point():
                target.add_((sources[name] - target).scale_(1.0 - momentum))


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
