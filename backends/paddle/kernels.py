"""Functions with gradients of their own, and norms, made of Paddle's operations.

Operations on rows are fast in Paddle unless they broadcast or sum over rows. Therefore vectors are
expanded first, and a sum over rows is a matrix product with ones.

Shape letters: N rows, C channels, D columns.
"""

import math

import paddle
import paddle.nn.functional as F
from paddle import Tensor
from paddle.autograd import PyLayer, PyLayerContext

from triptych.core.contracts import Group

GRADIENT_KERNELS = hasattr(paddle._C_ops, "batch_norm_grad")
"""Whether Paddle lets Python call the kernels of gradients. Version 2.6 does not."""


def statistics_dtype(x: Tensor) -> paddle.dtype:
    """The type of the statistics of ``x`` in the kernels. It is float32 for half precision, too."""
    return paddle.float64 if x.dtype == paddle.float64 else paddle.float32


def sum_rows(x: Tensor) -> Tensor:
    """The sum over rows. (N, D) -> (D,)."""
    return paddle.matmul(paddle.ones([1, x.shape[0]], x.dtype), x)[0]


def batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalises by the statistics of ``x`` and returns these.

    The running statistics of the kernels cannot be used: their momentum is rounded to float32, and
    their variance is biased on the CPU and unbiased on a GPU (cuDNN). The statistics that the
    kernels keep for the backward pass are the same everywhere. No public function returns them.

    Returns:
        The result, in the shape of ``x``.
        (C,), mean.
        (C,), biased variance.
    """
    zeros = [paddle.zeros([x.shape[1]], statistics_dtype(x)) for _ in range(2)]
    # Not in test mode, momentum 0, and with the statistics of the batch instead of the zeros.
    options = (False, 0.0, epsilon, "NCHW", False, False)
    y, _, _, mean, deviation, _ = paddle._C_ops.batch_norm(x, *zeros, weight, bias, *options)
    with paddle.no_grad():  # the kernel's deviation is 1 / sqrt(variance + epsilon)
        return y, mean, 1.0 / paddle.square(deviation) - epsilon


def shared_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, epsilon: float, group: Group
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Normalises by the statistics of all processes of a group. Paddle's layer needs a GPU.

    Returns:
        The result, in the shape of ``x``.
        (C,), mean.
        (C,), biased variance.
        Number of values per channel.
    """
    channels, dtype = x.shape[1], statistics_dtype(x)
    with paddle.no_grad():
        own = math.prod(x.shape) // channels
        _, *moments = batch_norm(x, None, None, epsilon)
        row = paddle.concat([paddle.full([1], own, dtype), *moments]).unsqueeze(0)
        sizes = [1, channels, channels]
        counts, means, variances = paddle.split(group.gather(row), sizes, axis=1)
        count = int(counts.sum())
        shares = (counts / float(count)).expand_as(means)
        mean = (shares * means).sum(0)
        # The variance of all values: within the processes, and between their means.
        variance = (shares * (variances + paddle.square(means - mean.expand_as(means)))).sum(0)
    if weight is None or bias is None:
        weight, bias = paddle.ones([channels], dtype), paddle.zeros([channels], dtype)
    y = _SharedNorm.apply(x, weight, bias, (mean, variance, epsilon), count, group)
    return y, mean, variance, count


class _SharedNorm(PyLayer):
    """Normalises by statistics of several processes. Its gradient counts that these depend on x.

    With fixed statistics the gradients of weight and bias are sums: those of g y and of g, where g
    is the gradient of the result and y the normalised input. The sums over all processes give x the
    further gradient -weight / sqrt(variance + epsilon) * (y * sum(g y) + sum(g)) / count.
    """

    @staticmethod
    def forward(
        ctx: PyLayerContext,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        statistics: tuple[Tensor, Tensor, float],
        count: int,
        group: Group,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.statistics, ctx.count, ctx.group = statistics, count, group
        ctx.affine = not weight.stop_gradient
        return F.batch_norm(x, *statistics[:2], weight, bias, epsilon=statistics[2])

    @staticmethod
    def backward(ctx: PyLayerContext, grad: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        x, weight, bias = ctx.saved_tensor()
        mean, variance, epsilon = ctx.statistics
        of_x, of_weight, of_bias = _given_norm_backward(
            grad, x, weight, bias, (mean, variance), epsilon
        )
        sums = ctx.group.sum(paddle.stack([of_weight, of_bias]))
        factor = weight * paddle.rsqrt(variance + epsilon) * (-1.0 / ctx.count)
        weights = factor * sums[0], factor * sums[1]
        of_x.add_(F.batch_norm(x, mean, variance, *weights, epsilon=epsilon))
        return (of_x, of_weight, of_bias) if ctx.affine else (of_x, None, None)


def _given_norm_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    statistics: tuple[Tensor, Tensor],
    epsilon: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, weight and bias of a batch norm with given mean and variance."""
    if GRADIENT_KERNELS:
        # In test mode. The statistics that a training step saves are not used.
        options = (None, grad, 0.0, epsilon, "NCHW", True, True, False)
        return paddle._C_ops.batch_norm_grad(x, weight, bias, *statistics, *statistics, *options)
    with paddle.enable_grad():
        leaves = [tensor.detach() for tensor in (x, weight, bias)]
        for leaf in leaves:
            leaf.stop_gradient = False
        y = F.batch_norm(leaves[0], *statistics, *leaves[1:], epsilon=epsilon)
        return paddle.grad([y], leaves, [grad])


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> Tensor:
    """Normalises over the last axis, then scales and shifts. (..., D), (D,), (D,) -> (..., D)."""
    return _LayerNorm.apply(x, weight, bias, epsilon)


def gelu(x: Tensor) -> Tensor:
    """x Phi(x), with the exact normal distribution Phi. Any shape."""
    return _Plain.apply(_onednn("gelu", _Plain.apply(x), "approximate", False))


def rectified_(x: Tensor) -> Tensor:
    """max(x, 0) in place. nan stays nan. Any shape."""
    return _Relu.apply(x)


def exp(x: Tensor) -> Tensor:
    """exp(x) by oneDNN, without a gradient. Any shape, contiguous."""
    return _plain(_onednn("exp", x))


def scale_shift(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x * weight + bias. (N, D), (D,), (D,) -> (N, D)."""
    return _ScaleShift.apply(x, weight, bias)


def biased_product(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x @ weight + bias. (..., in), (in, out), (out,) -> (..., out)."""
    return _BiasedProduct.apply(x, weight, bias)


def _onednn(name: str, x: Tensor, *attributes: object) -> Tensor:
    """An operation by the kernel of oneDNN, twice as fast as Paddle's own on the CPU.

    Paddle's functions do not ask for it. It marks its result, and its gradient, with which other
    operations than ``_plain`` fail.

    Args:
        x: contiguous.
        attributes: names and values.
    """
    return getattr(paddle._legacy_C_ops, name)(x, *attributes, "use_mkldnn", True)


def _plain(x: Tensor) -> Tensor:
    """The same numbers, contiguous and without oneDNN's mark."""
    found = paddle.empty(x.shape, x.dtype)
    x.contiguous()._share_buffer_to(found)
    return found


class _LayerNorm(PyLayer):
    """Paddle's layer norm with a gradient in the form of batch norm, where each row is a channel.

    The backward pass of Paddle's layer norm takes 15 times as long as its forward pass.
    """

    @staticmethod
    def forward(
        ctx: PyLayerContext, x: Tensor, weight: Tensor, bias: Tensor, epsilon: float
    ) -> Tensor:
        # The other functions hide the statistics that the kernel returns.
        options = ("epsilon", epsilon, "begin_norm_axis", x.ndim - 1)
        y, mean, variance = paddle._legacy_C_ops.layer_norm(x, weight, bias, *options)
        ctx.save_for_backward(x, weight, mean, variance)
        ctx.epsilon = epsilon
        return y

    @staticmethod
    def backward(ctx: PyLayerContext, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight, mean, variance = ctx.saved_tensor()
        rows, grad = (tensor.reshape([-1, tensor.shape[-1]]) for tensor in (x, grad))
        mean, inverse = mean.flatten(), paddle.rsqrt(variance.flatten() + ctx.epsilon)
        scaled = paddle.expand(weight, grad.shape).multiply_(grad)
        statistics = (None, None, None, None, mean, inverse, None)
        options = (0.0, ctx.epsilon, "NCHW", False, False, False)
        of_x, _, _ = paddle._C_ops.batch_norm_grad(
            rows.unsqueeze(0), *statistics, scaled.unsqueeze(0), *options
        )
        along = (rows - paddle.expand(mean.unsqueeze(1), rows.shape)).multiply_(grad)
        of_weight = paddle.matmul(inverse.unsqueeze(0), along)[0]
        return of_x.reshape(x.shape), of_weight, sum_rows(grad)


class _Plain(PyLayer):
    """``_plain`` of a tensor, and of its gradient."""

    @staticmethod
    def forward(ctx: PyLayerContext, x: Tensor) -> Tensor:
        return _plain(x)

    @staticmethod
    def backward(ctx: PyLayerContext, grad: Tensor) -> Tensor:
        return _plain(grad)


class _Relu(PyLayer):
    """``rectified_`` with its gradient.

    It saves its result, as the next layer does. ``leaky_relu`` would save its input, too. It may
    overwrite its input: the layers before it (batch norms, sums and linear layers) do not need
    their results in the backward pass.
    """

    @staticmethod
    def forward(ctx: PyLayerContext, x: Tensor) -> Tensor:
        y = F.leaky_relu_(x, 0.0)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: PyLayerContext, grad: Tensor) -> Tensor:
        (y,) = ctx.saved_tensor()
        # heaviside(y, y) is 1 for y > 0 and 0 at 0. A comparison with a cast is 3 times slower,
        # ``where`` 10 times.
        return paddle.heaviside(y, y).multiply_(grad)


class _ScaleShift(PyLayer):
    """x * weight + bias. x: (N, D)."""

    @staticmethod
    def forward(ctx: PyLayerContext, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return (paddle.expand(weight, x.shape) * x).add_(paddle.expand(bias, x.shape))

    @staticmethod
    def backward(ctx: PyLayerContext, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight = ctx.saved_tensor()
        return paddle.expand(weight, x.shape) * grad, sum_rows(grad * x), sum_rows(grad)


class _BiasedProduct(PyLayer):
    """x @ weight + bias. x: (..., in), weight: (in, out)."""

    @staticmethod
    def forward(ctx: PyLayerContext, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        rows = x.reshape([-1, x.shape[-1]])
        ctx.save_for_backward(rows, weight)
        ctx.wanted = [not tensor.stop_gradient for tensor in (x, weight, bias)]
        return paddle.addmm(bias, rows, weight).reshape([*x.shape[:-1], weight.shape[1]])

    @staticmethod
    def backward(ctx: PyLayerContext, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensor()
        shape = [*grad.shape[:-1], weight.shape[0]]
        grad = grad.reshape([-1, grad.shape[-1]])
        of_x, of_weight, of_bias = ctx.wanted  # the codebook's words have no gradient
        return (
            paddle.matmul(grad, weight, transpose_y=True).reshape(shape) if of_x else None,
            paddle.matmul(x, grad, transpose_x=True) if of_weight else None,
            sum_rows(grad) if of_bias else None,
        )
