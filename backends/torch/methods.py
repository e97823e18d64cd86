"""The methods' modules: student, teacher and how one is moved towards the other."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from triptych.backends.torch.encoders import encoder
from triptych.backends.torch.heads import head
from triptych.backends.torch.layers import set_virtual_ranks
from triptych.backends.torch.memory import Codebook, Queue
from triptych.backends.torch.moca import Decoder, Generator
from triptych.core.config.spec import RunSpec
from triptych.core.contracts import Array, MocaModel, Model, QueueModel
from triptych.core.methods import networks


class Branch(networks.Branch, nn.Module):
    """A student or a teacher, see ``core.methods.networks.Branch``."""


def _indices(ids: Array, like: Tensor) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(ids)).to(like.device)


KIT = networks.Kit(
    Branch, encoder, head, set_virtual_ranks, Queue, Codebook, Decoder, Generator, _indices
)


class Pair(networks.Branches, nn.Module):
    """``core.contracts.Model``: a student and a teacher that follows it; paths are canonical names.

    Args:
        student: has all that the teacher has, and may have more.
    """

    kit = KIT

    mixed = False
    """Whether the networks compute in bfloat16 where PyTorch holds that to be safe."""

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
        # Left before the loss and before the backward pass, whose kernels take what the forward
        # pass took: inside, they would round gradients of float32 tensors, too.
        with torch.autocast(arguments[0].device.type, torch.bfloat16):
            found = part(*arguments)
        return tree_map_only(Tensor, Tensor.float, found)

    @torch.no_grad()
    def update_teacher(self, momentum: float) -> None:
        """See ``core.contracts.Model``."""
        torch._foreach_lerp_(self._targets, self._sources, 1.0 - momentum)


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
