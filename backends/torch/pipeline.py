"""The stage of a pipeline: PyTorch's part of ``core.parallel.stage``."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from triptych.backends.torch.parallel import Group
from triptych.core import contracts
from triptych.core.config.spec import RunSpec, VitSpec
from triptych.core.parallel import stage


class Stage(stage.Stage):
    """See ``core.parallel.stage.Stage``.

    Args:
        like: a tensor of the type and on the device of the tokens.
    """

    def __init__(self, depth: int, group: Group, like: Tensor) -> None:
        super().__init__(depth, group)
        self._group, self._like = group, like

    def is_recording(self) -> bool:
        """See ``core.parallel.stage.Stage``."""
        return torch.is_grad_enabled()

    def zeros(self, shape: Sequence[int]) -> Tensor:
        """See ``core.parallel.stage.Stage``."""
        return self._like.new_zeros(shape)

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        """See ``core.parallel.stage.Stage``."""
        return torch.cat([x.flatten() for x in tensors])

    def divide(self, numbers: Tensor, shape: Sequence[int]) -> Sequence[Tensor]:
        """See ``core.parallel.stage.Stage``."""
        return numbers.view(shape).unbind()

    def size(self, x: Tensor) -> int:
        """See ``core.parallel.stage.Stage``."""
        return x.numel()

    def leaf(self, numbers: Tensor) -> Tensor:
        """See ``core.parallel.stage.Stage``."""
        return numbers.requires_grad_()

    def backward(self, x: Tensor, gradient: Tensor | None) -> None:
        """See ``core.parallel.stage.Stage``."""
        x.backward(gradient)

    def send(self, numbers: Tensor, target: int) -> None:
        """See ``core.parallel.stage.Stage``."""
        self._group.send(numbers, target)

    def receive(self, size: int, source: int) -> Tensor:
        """See ``core.parallel.stage.Stage``."""
        numbers = self._like.new_empty(size)
        self._group.receive(numbers, source)
        return numbers

    def send_size(self, size: int, target: int) -> None:
        """See ``core.parallel.stage.Stage``."""
        self._group.send(torch.tensor([size]), target)

    def receive_size(self, source: int) -> int:
        """See ``core.parallel.stage.Stage``."""
        size = torch.empty(1, dtype=torch.int64)
        self._group.receive(size, source)
        return int(size)

    def of_the_last(self, x: Tensor) -> Tensor:
        """See ``core.parallel.stage.Stage``."""
        x = x.detach().clone()
        self._group.broadcast(x, self._group.count - 1)
        return x


class Absent(nn.Module):
    """Takes the place of a network of the last stage. (N, ...) -> (N, width), zeros."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        """The decoder has a row for each number of its last argument."""
        rows = others[-1].numel() if others else len(x)
        return x.new_zeros(rows, self.width)


def keep_stage(
    model: nn.Module, spec: RunSpec, group: contracts.Group, like: Tensor
) -> Stage | None:
    """Leaves this process its stage of a whole model, in place. None: there is no pipeline.

    Args:
        model: of a method.
        group: the processes of the pipeline.
        like: a tensor of the type and on the device of the tokens.
    """
    if group.count == 1:
        return None
    own = Stage(cast(VitSpec, spec.model).depth, cast(Group, group), like)
    stage.keep(model, spec, own, stage.Substitutes(nn.Identity, Absent))
    return own
