"""The networks of each method: student, teacher, and the update of the teacher."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from triptych.backends.torch.encoders import encoder
from triptych.backends.torch.heads import head
from triptych.backends.torch.layers import set_virtual_ranks
from triptych.backends.torch.memory import Codebook, Queue
from triptych.backends.torch.moca import Decoder, Generator
from triptych.core.config.spec import RunSpec
from triptych.core.contracts import Array, MocaModel, Model, QueueModel
from triptych.core.methods import networks


class Branch(networks.Branch, nn.Module):
    """A student or a teacher (see ``core.methods.networks.Branch``)."""


def _indices(ids: Array, like: Tensor) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(ids)).to(like.device)


KIT = networks.Kit(
    Branch, encoder, head, set_virtual_ranks, Queue, Codebook, Decoder, Generator, _indices
)


class Pair(networks.Branches, nn.Module):
    """A student and a teacher that follows it. The paths of all tensors are canonical names.

    Args:
        student: has all parameters of the teacher under the same names, and may have more.
        teacher: gets no gradients.
    """

    kit = KIT

    mixed = False
    """Whether the networks compute in bfloat16 where PyTorch's autocast considers that safe."""

    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        super().__init__(student, teacher)
        teacher.requires_grad_(False)
        sources = dict(student.named_parameters())
        self._targets: list[Tensor] = list(teacher.parameters())
        self._sources: list[Tensor] = [sources[name] for name, _ in teacher.named_parameters()]

    def compute(self, part: Callable[..., Any], *arguments: Tensor) -> Any:
        """See ``core.methods.networks.Branches``."""
        if not self.mixed:
            return part(*arguments)
        # Autocast ends before the loss and the backward pass. The backward pass repeats the types
        # of the forward pass by itself; inside, it would round gradients of float32 tensors, too.
        with torch.autocast(arguments[0].device.type, torch.bfloat16):
            output = part(*arguments)
        return _as_float32(output)

    def update_teacher(self, momentum: float) -> None:
        """See ``core.contracts.Model``."""
        update = get_ema_multi_avg_fn(momentum)
        update(self._targets, self._sources, 0)


class MoCo(networks.MoCo, Pair):
    """Implements ``core.contracts.QueueModel`` for MoCo v1 and v2."""


class MoCoV3(networks.MoCoV3, Pair):
    """Implements ``core.contracts.Model`` for MoCo v3."""


class MOCA(networks.MOCA, Pair):
    """Implements ``core.contracts.MocaModel``."""


def _as_float32(output: Any) -> Any:
    """A tensor, or the tensors of a tuple or a dict, as float32."""
    if isinstance(output, dict):
        return {name: tensor.float() for name, tensor in output.items()}
    if isinstance(output, tuple):
        return tuple(tensor.float() for tensor in output)
    return output.float()


Build = Callable[[RunSpec], Pair]
METHODS: dict[str, Build] = {"moco_v1": MoCo, "moco_v2": MoCo, "moco_v3": MoCoV3, "moca": MOCA}

_MOCO: type[QueueModel] = MoCo
_MOCO_V3: type[Model] = MoCoV3
_MOCA: type[MocaModel] = MOCA
