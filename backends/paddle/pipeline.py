"""The stage of a pipeline: Paddle's part of ``core.parallel.stage``."""

from collections.abc import Sequence
from typing import Any, cast

import paddle
from paddle import Tensor, nn

from triptych.backends.paddle.parallel import Group
from triptych.core import contracts
from triptych.core.config.spec import RunSpec, VitSpec
from triptych.core.parallel import stage


class Stage(stage.Stage):
    """See ``core.parallel.stage.Stage``.

    Args:
        dtype: of the tokens.
    """

    def __init__(self, depth: int, group: Group, dtype: Any) -> None:
        super().__init__(depth, group)
        self._group, self._dtype = group, dtype

    def is_recording(self) -> bool:
        """See ``core.parallel.stage.Stage``."""
        return paddle.is_grad_enabled()

    def zeros(self, shape: Sequence[int]) -> Tensor:
        """See ``core.parallel.stage.Stage``."""
        return paddle.zeros(list(shape), self._dtype)

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        """See ``core.parallel.stage.Stage``."""
        return paddle.concat([x.flatten() for x in tensors])

    def divide(self, numbers: Tensor, shape: Sequence[int]) -> Sequence[Tensor]:
        """See ``core.parallel.stage.Stage``."""
        return numbers.reshape(list(shape)).unbind()

    def size(self, x: Tensor) -> int:
        """See ``core.parallel.stage.Stage``."""
        return int(x.size)

    def leaf(self, numbers: Tensor) -> Tensor:
        """See ``core.parallel.stage.Stage``."""
        numbers.stop_gradient = False
        return numbers

    def backward(self, x: Tensor, gradient: Tensor | None) -> None:
        """See ``core.parallel.stage.Stage``."""
        x.backward(gradient)

    def send(self, numbers: Tensor, target: int) -> None:
        """See ``core.parallel.stage.Stage``."""
        self._group.send(numbers, target)

    def receive(self, size: int, source: int) -> Tensor:
        """See ``core.parallel.stage.Stage``."""
        numbers = paddle.zeros([size], self._dtype)
        self._group.receive(numbers, source)
        return numbers

    def send_size(self, size: int, target: int) -> None:
        """See ``core.parallel.stage.Stage``."""
        self._group.send(paddle.to_tensor([size], "int64"), target)

    def receive_size(self, source: int) -> int:
        """See ``core.parallel.stage.Stage``."""
        size = paddle.zeros([1], "int64")
        self._group.receive(size, source)
        return int(size)

    def of_the_last(self, x: Tensor) -> Tensor:
        """See ``core.parallel.stage.Stage``."""
        x = x.detach().clone()
        self._group.broadcast(x, self._group.count - 1)
        return x


class Absent(nn.Layer):
    """Takes the place of a network of the last stage. (N, ...) -> (N, width), zeros."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        """The decoder has a row for each number of its last argument."""
        rows = others[-1].size if others else len(x)
        return paddle.zeros([rows, self.width], x.dtype)


def keep_stage(model: nn.Layer, spec: RunSpec, group: contracts.Group, dtype: Any) -> Stage | None:
    """Leaves this process its stage of a whole model, in place. None: there is no pipeline.

    Args:
        model: of a method.
        group: the processes of the pipeline.
        dtype: of the tokens.
    """
    if group.count == 1:
        return None
    own = Stage(cast(VitSpec, spec.model).depth, cast(Group, group), dtype)
    stage.keep(model, spec, own, stage.Substitutes(nn.Identity, Absent))
    return own
