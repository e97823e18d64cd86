"""The networks of each method: student, teacher, and the update of the teacher."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from triptych.backends.torch.encoders import encoder
from triptych.backends.torch.heads import head
from triptych.backends.torch.layers import BatchNorm, set_batch_norm, set_tracking
from triptych.backends.torch.memory import Codebook, Queue
from triptych.backends.torch.moca import Decoder, Generator
from triptych.core.contracts import Index
from triptych.core.methods import models, networks


class Branch(networks.Branch, nn.Module):
    """A student or a teacher (see ``core.methods.networks.Branch``)."""


KIT = networks.Kit(
    branch=Branch,
    encoder=encoder,
    head=head,
    set_batch_norm=set_batch_norm,
    set_tracking=set_tracking,
    queue=Queue,
    codebook=Codebook,
    decoder=Decoder,
    generator=Generator,
    linear=nn.Linear,
)


class Pair(networks.Branches, nn.Module):
    """A student and a teacher (see ``core.methods.networks.Branches``)."""

    kit = KIT

    mixed: torch.dtype | None = None
    """The type in which the networks compute where PyTorch's autocast considers that safe."""

    compiler: str | Callable[..., Any] | None = None
    """The compiler of the networks, as ``torch.compile`` takes it; None: they are not compiled."""

    def __init__(self, student: nn.Module, teacher: nn.Module | None = None) -> None:
        super().__init__(student, teacher)
        self._compiled: dict[Callable[..., Any], Callable[..., Any]] = {}
        self.follow()

    def follow(self) -> None:
        """Finds the parameters that the teacher has, and those of the student that they follow."""
        sources = dict(self.student.named_parameters())
        followed = {} if self.teacher is None else dict(self.teacher.named_parameters())
        self._targets: list[Tensor] = list(followed.values())
        self._sources: list[Tensor] = [sources[name] for name in followed]

    def compute(self, part: Callable[..., Any], *arguments: Any) -> Any:
        """See ``core.methods.networks.Branches``."""
        if self.compiler is not None:
            if part not in self._compiled:
                self._compiled[part] = _compiled(part, self.compiler)
            part = self._compiled[part]
        if self.mixed is None:
            return part(*arguments)
        # Autocast ends before the loss and the backward pass. The backward pass repeats the types
        # of the forward pass by itself; inside, it would round gradients of float32 tensors, too.
        with torch.autocast(arguments[0].device.type, self.mixed):
            output = part(*arguments)
        return networks.each_tensor(Tensor.float, output)

    def update_teacher(self, momentum: float) -> None:
        """See ``core.contracts.Model``."""
        if self._targets:
            update = get_ema_multi_avg_fn(momentum)
            update(self._targets, self._sources, 0)
        if self.statistics != "own":
            self._update_statistics(momentum)

    @torch.no_grad()
    def _update_statistics(self, momentum: float) -> None:
        """Averages or copies the running statistics of the teacher's batch norms."""
        followed = () if self.teacher is None else self.teacher.named_buffers()
        sources = dict(self.student.named_buffers())
        for name, target in followed:
            if self.statistics == "copied":
                target.copy_(sources[name])
            elif target.is_floating_point():
                target.lerp_(sources[name], 1.0 - momentum)

    @staticmethod
    def freeze(module: nn.Module) -> None:
        """See ``core.methods.networks.Branches``."""
        module.requires_grad_(False)

    @staticmethod
    def indices(index: Index, like: Tensor) -> Tensor:
        """See ``core.methods.networks.Branches``."""
        if isinstance(index, Tensor):
            return index
        return torch.from_numpy(np.ascontiguousarray(index)).to(like.device)

    @staticmethod
    def concat(parts: list[Tensor]) -> Tensor:
        """See ``core.methods.networks.Branches``."""
        return torch.cat(parts, dim=1)


def _compiled(part: Callable[..., Any], compiler: str | Callable[..., Any]) -> Callable[..., Any]:
    """The part, compiled. What holds batch norms of several processes stays as it is.

    Every shape has code of its own. Code for all shapes would take over after the first smaller
    batch, and a run that is resumed would not repeat it.
    """
    module: Any = getattr(part, "__self__", part)
    if any(isinstance(each, BatchNorm) and each.group.count > 1 for each in module.modules()):
        return part
    return torch.compile(part, backend=compiler, dynamic=False, fullgraph=True)


METHODS = models.complete(Pair)
