"""The operations of the norms, with their gradients, in OneFlow and in NumPy.

Shape letters: R virtual ranks, N rows or images, D columns, C channels, P positions of a map.
"""

from functools import cache
from typing import Any

import numpy as np
import oneflow as flow
from oneflow import Tensor

from triptych.backends.oneflow import channels, kernels
from triptych.backends.oneflow.sums import centred_rows, channel_sum, column_sum, repeat
from triptych.core.contracts import Array, Group


class NormalizeRows(flow.autograd.Function):
    """weight * centred * inverse + bias.

    The gradient is that of x, from which ``centred`` and ``inverse`` were computed.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, centred: Tensor, inverse: Tensor, weight: Tensor, bias: Tensor
    ) -> Tensor:
        """(N, D), (N, D), (N, 1), (D,), (D,) -> (N, D)."""
        normal = centred * repeat(inverse, centred.shape[1])
        ctx.save_for_backward(normal, inverse, weight)
        return normal * weight + bias

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """(N, D) -> the gradients of the inputs. The second and the third have none."""
        normal, inverse, weight = ctx.saved_tensors
        width = normal.shape[1]
        inner = grad * normal
        along = repeat(flow.matmul(inner, (weight / width).reshape(width, 1)), width)
        grad_x = (centred_rows(grad * weight) - normal * along) * repeat(inverse, width)
        return grad_x, None, None, column_sum(inner).reshape(width), column_sum(grad).reshape(width)


@cache
def normalize_rows_in_numpy(eps: float) -> type[flow.autograd.Function]:
    """Layer norm of rows. (N, D), (D,), (D,) -> (N, D)."""

    class NormalizeRowsInNumpy(flow.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            y, *kept = kernels.normalize_rows(x.numpy(), weight.numpy(), bias.numpy(), eps)
            ctx.save_for_backward(*map(flow.from_numpy, kept), weight)
            return flow.from_numpy(y)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
            kept = (saved.numpy() for saved in ctx.saved_tensors)
            gradients = kernels.normalize_rows_backward(*kept, grad.numpy())
            return tuple(map(flow.from_numpy, gradients))

    return NormalizeRowsInNumpy


def total(group: Group, count: float, *own: Tensor) -> tuple[Tensor | float, ...]:
    """The number of values of a channel, and sums over them, of all processes of a group.

    Args:
        count: of this process.
        own: sums of this process, each of the same shape.
    """
    if group.count == 1:
        return count, *own
    joined = flow.cat([*(x.reshape(-1) for x in own), own[0].new_full((1,), count)])
    *totals, number = group.sum(joined).split([x.numel() for x in own] + [1])
    return number, *(x.reshape(*own[0].shape) for x in totals)


def total_in_numpy(group: Group) -> channels.Total:
    """Likewise, for the module ``channels``."""

    def shared(sums: Array, count: float) -> tuple[Array, float]:
        joined = group.sum(flow.from_numpy(np.append(sums, count))).numpy()
        return joined[:-1].reshape(sums.shape), float(joined[-1])

    return channels.alone if group.count == 1 else shared


@cache
def normalize_channels(group: Group) -> type[flow.autograd.Function]:
    """As ``NormalizeRows``, for channels. (N, C, P, 1). A group shares the statistics.

    With three dimensions, the kernels would broadcast over a channel a hundred times more slowly.
    """

    class NormalizeChannels(flow.autograd.Function):
        @staticmethod
        def forward(
            ctx: Any, x: Tensor, centred: Tensor, inverse: Tensor, weight: Tensor, bias: Tensor
        ) -> Tensor:
            normal = centred * inverse
            ctx.save_for_backward(normal, inverse, weight)
            return normal * weight.reshape(1, -1, 1, 1) + bias.reshape(1, -1, 1, 1)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
            normal, inverse, weight = ctx.saved_tensors
            own = channel_sum(grad * normal), channel_sum(grad)
            count, along, whole = total(group, grad.numel() / grad.shape[1], *own)
            factor = weight.reshape(1, -1, 1, 1) * inverse
            grad_x = (grad - whole / count - normal * (along / count)) * factor
            return grad_x, None, None, *(x.reshape(-1) for x in own)

    return NormalizeChannels


@cache
def normalize_channels_in_numpy(group: Group) -> type[flow.autograd.Function]:
    """Returns y, the result of ``channels.normalize``, with the gradient of x. (R, N, C, P)."""

    class NormalizeInNumpy(flow.autograd.Function):
        @staticmethod
        def forward(
            ctx: Any,
            x: Tensor,
            weight: Tensor,
            bias: Tensor,
            y: Tensor,
            centred: Tensor,
            factors: Tensor,
        ) -> Tensor:
            ctx.save_for_backward(centred, factors)
            return y

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
            centred, factors = (tensor.numpy() for tensor in ctx.saved_tensors)
            own = centred, factors, grad.numpy()
            gradients = channels.normalize_backward(*own, total_in_numpy(group))
            return *(flow.from_numpy(array) for array in gradients), None, None, None

    return NormalizeInNumpy
