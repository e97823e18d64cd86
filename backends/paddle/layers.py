"""Layers whose built-in form is slow or inexact on Paddle's CPU, written from its own operations.

Paddle works row-wise at full speed only where nothing is broadcast and nothing is summed over
rows: a column vector is repeated first, sums over rows are matrix products with ones.

Shape letters: N rows, D columns.
"""

import math

import paddle
import paddle.nn.functional as F
from paddle import ParamAttr, Tensor, nn
from paddle.autograd import PyLayer, PyLayerContext
from paddle.nn.initializer import Constant

EPSILON = 2.0**-16
"""What the kernels get for a norm's epsilon, see ``exact_epsilon``: a power of two between the
least that older cuDNNs take, 1e-5, and the most that Paddle takes, 1e-3."""


def plain_forms_serve(x: Tensor) -> bool:
    """Whether Paddle's own forms are fast: on a GPU; in a graph to export they are also smaller."""
    return not paddle.in_dynamic_mode() or not x.place.is_cpu_place()


class LayerNorm(nn.Layer):
    """Normalises over the last axis, then scales and shifts.

    Args:
        epsilon: added to the variance.
    """

    def __init__(self, width: int, epsilon: float = 1e-6) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.weight = self.create_parameter([width], default_initializer=Constant(1.0))
        self.bias = self.create_parameter([width], is_bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        factor, epsilon = exact_epsilon(self.epsilon, x)
        x = x if factor == 1.0 else x * factor
        if plain_forms_serve(x):
            return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, epsilon)
        # The backward pass of layer_norm takes 20 times as long as its forward pass. Batch norm
        # with each row as a channel computes the same.
        rows = x.reshape([1, -1, x.shape[-1]])
        mean, variance = (paddle.zeros([rows.shape[1]], statistics_dtype(x)) for _ in range(2))
        normal = F.batch_norm(
            rows, mean, variance, None, None, training=True, momentum=0.0, epsilon=epsilon
        )
        rows = normal.reshape([-1, x.shape[-1]])
        return _ScaleShift.apply(rows, self.weight, self.bias).reshape(x.shape)


class BatchNorm(nn.Layer):
    """Batch norm with PyTorch's rules: unbiased running variance, statistics are no parameters.

    Each of ``virtual_ranks`` contiguous parts of a training batch is normalised by itself; the
    running statistics are those of the first part, as a first rank would save them.

    Args:
        momentum: weight of the new batch in the running statistics.
        epsilon: added to the variance.
    """

    virtual_ranks = 1

    def __init__(
        self, width: int, *, affine: bool = True, momentum: float = 0.1, epsilon: float = 1e-5
    ) -> None:
        super().__init__()
        self.momentum, self.epsilon = momentum, epsilon
        self.weight = self.bias = None
        if affine:
            self.weight = self.create_parameter([width], default_initializer=Constant(1.0))
            self.bias = self.create_parameter([width], is_bias=True)
        self.register_buffer("running_mean", paddle.zeros([width]))
        self.register_buffer("running_var", paddle.ones([width]))
        self.register_buffer("num_batches_tracked", paddle.zeros([], "int64"))

    def forward(self, x: Tensor) -> Tensor:
        """(N, D) or (N, D, ...), normalised over all axes but the second.

        Raises:
            ValueError: one value per channel in training, which Paddle would hand back unchanged.
        """
        if not self.training:
            factor, epsilon = exact_epsilon(self.epsilon, x)
            mean, variance = self.running_mean * factor, self.running_var * factor**2
            x = x if factor == 1.0 else x * factor
            return F.batch_norm(x, mean, variance, self.weight, self.bias, epsilon=epsilon)
        if self.virtual_ranks == 1:
            return self._normalise(x, track=True)
        first, *others = paddle.split(x, self.virtual_ranks)
        parts = [self._normalise(first, track=True)]
        parts += [self._normalise(part, track=False) for part in others]
        return paddle.concat(parts)

    def _normalise(self, x: Tensor, *, track: bool) -> Tensor:
        """With the statistics of ``x``, towards which the running ones move where asked."""
        count = math.prod(x.shape) // x.shape[1]
        if count == 1:
            raise ValueError(f"batch norm: more than one value per channel needed, got {x.shape}")
        factor, epsilon = exact_epsilon(self.epsilon, x)
        x = x if factor == 1.0 else x * factor
        y, mean, deviation = _batch_norm(x, self.weight, self.bias, epsilon)
        if track:
            with paddle.no_grad():
                m = self.momentum
                unbiased = m / factor**2 * count / (count - 1)
                variance = 1.0 / paddle.square(deviation) - epsilon
                self.running_mean.scale_(1.0 - m).add_(mean * (m / factor))
                self.running_var.scale_(1.0 - m).add_(variance * unbiased)
                paddle.increment(self.num_batches_tracked)
        return y


def set_virtual_ranks(model: nn.Layer, count: int) -> None:
    """Tells every batch norm inside how many parts a batch has."""
    for layer in model.sublayers():
        if isinstance(layer, BatchNorm):
            layer.virtual_ranks = count


def statistics_dtype(x: Tensor) -> paddle.dtype:
    """In what the kernels keep the statistics of ``x``: float32 for half precision, too."""
    return paddle.float64 if x.dtype == paddle.float64 else paddle.float32


def exact_epsilon(epsilon: float, x: Tensor) -> tuple[float, float]:
    """By what to multiply ``x``, and the epsilon that then normalises it as ``epsilon`` would.

    The kernels round epsilon to float32, an error of 1e-9 where the variance is smaller still, as
    that of a class token at the start; and they take none above 1e-3. But norm(x, e) is
    norm(c x, c^2 e), and c can be chosen so that c^2 e is a power of two.
    """
    if x.dtype != paddle.float64 and epsilon <= 1e-3:
        return 1.0, epsilon
    return math.sqrt(EPSILON / epsilon), EPSILON


class Gelu(nn.Layer):
    """x times the normal distribution function of x."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape."""
        return F.gelu(x)


class ReLU(nn.Layer):
    """``relu_``: the layer before it loses its result, as with PyTorch's in-place module."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape."""
        return relu_(x)


def relu_(x: Tensor) -> Tensor:
    """max(x, 0), and nan for nan, in place. Any shape.

    ``F.relu`` makes 0 of nan: a network that has gone bad would train on at the chance level.
    """
    return _Relu.apply(x) if paddle.in_dynamic_mode() else F.leaky_relu(x, 0.0)


def max_pool(x: Tensor) -> Tensor:
    """Maximum of each 3x3 square, stride 2, padding 1; a map of nan stays nan. (N, C, H, W)."""
    # Asked for the places of the maxima as well, the backward pass takes a fifth of the time. Of a
    # square of nan the place is -1, and its gradient is written to memory of somebody else.
    if plain_forms_serve(x) or not math.isfinite(float(x.detach().sum())):
        return F.max_pool2d(x, 3, 2, 1)
    return F.max_pool2d(x, 3, 2, 1, return_mask=True)[0]


class Linear(nn.Linear):
    """Paddle's linear layer, weight (in, out), without initial values of its own."""

    def __init__(self, fan_in: int, fan_out: int, *, bias: bool = True) -> None:
        zeros = ParamAttr(initializer=Constant(0.0))
        super().__init__(fan_in, fan_out, weight_attr=zeros, bias_attr=None if bias else False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return linear(x, self.weight, self.bias)


class Conv2D(nn.Conv2D):
    """Paddle's square convolution, without initial values of its own."""

    def __init__(
        self,
        fan_in: int,
        fan_out: int,
        kernel: int,
        stride: int = 1,
        padding: int = 0,
        *,
        bias: bool = True,
    ) -> None:
        zeros = ParamAttr(initializer=Constant(0.0))
        super().__init__(
            fan_in,
            fan_out,
            kernel,
            stride,
            padding,
            weight_attr=zeros,
            bias_attr=zeros if bias else False,
        )
        self.stride, self.pointwise = stride, kernel == 1 and not padding and not bias

    def forward(self, x: Tensor) -> Tensor:
        """(N, in, H, W) -> (N, out, H', W')."""
        # Not super(): Paddle 2.6 does not find it when it makes a graph of this.
        if not self.pointwise or plain_forms_serve(x):
            return nn.Conv2D.forward(self, x)
        fan_out, fan_in = self.weight.shape[:2]
        positions = math.prod(-(-side // self.stride) for side in x.shape[2:])
        # Paddle multiplies image by image, and adds up the gradient of the weight as often. Where
        # that is much larger than the maps it is faster to bring all images together.
        if fan_out * fan_in < 4 * positions * (fan_out + fan_in):
            return nn.Conv2D.forward(self, x)
        return mix_channels(x[:, :, :: self.stride, :: self.stride], self.weight)


def mix_channels(x: Tensor, weight: Tensor) -> Tensor:
    """A 1x1 convolution as one product. (N, C, H, W), (D, C, 1, 1) -> (N, D, H, W)."""
    n, _, height, width = x.shape
    columns = x.transpose([1, 0, 2, 3]).flatten(1)
    y = paddle.matmul(weight.flatten(1), columns).reshape([-1, n, height, width])
    return y.transpose([1, 0, 2, 3])


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear``, with a faster way to add the bias and to sum its gradient."""
    if bias is None or plain_forms_serve(x):
        return F.linear(x, weight, bias)
    return _Linear.apply(x, weight, bias)


def linear_weights(model: nn.Layer) -> frozenset[str]:
    """Names of the weights that Paddle keeps as (in, out): told by layer, squares look alike."""
    return frozenset(
        f"{path}.weight" for path, layer in model.named_sublayers() if isinstance(layer, nn.Linear)
    )


class PatchEmbed(nn.Layer):
    """One token per square patch."""

    def __init__(self, channels: int, width: int, patch_size: int) -> None:
        super().__init__()
        self.proj: nn.Layer = Conv2D(channels, width, patch_size, patch_size)

    def forward(self, images: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, patches, D), row by row."""
        return self.proj(images).flatten(2).transpose([0, 2, 1])


def unit_rows(x: Tensor, eps: float) -> Tensor:
    """x / max(|x|, eps). (N, D)."""
    # F.normalize gives the same numbers and takes ten times as long.
    return x * paddle.rsqrt(paddle.clip((x * x).sum(-1, keepdim=True), min=eps * eps))


def pick_tokens(x: Tensor, ids: Tensor) -> Tensor:
    """result[n, i] = x[n, ids[n, i]], and x[0, ids[n, i]] where x has one image only.

    Args:
        x: (N, L, D) or (1, L, D).
        ids: (N, T) int64.
    """
    n, length, width = x.shape
    rows = ids if n == 1 else ids + (paddle.arange(n, dtype=ids.dtype) * length).unsqueeze(1)
    picked = paddle.gather(x.reshape([-1, width]), rows.flatten())
    return picked.reshape([*ids.shape, width])


def sum_rows(x: Tensor) -> Tensor:
    """(N, D) -> (D,)."""
    return paddle.matmul(paddle.ones([1, x.shape[0]], x.dtype), x)[0]


def _batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalises with the statistics of ``x``, which come back as they were used.

    The kernels' own running statistics take a float32 momentum, and the variance in them is the
    biased one on the CPU and the unbiased one of cuDNN. What they keep for the backward pass is the
    same everywhere.

    Returns:
        The result; (C,) mean; (C,) 1 / sqrt(biased variance + epsilon).
    """
    zeros = [paddle.zeros([x.shape[1]], statistics_dtype(x)) for _ in range(2)]
    # Test mode off, momentum 0, and statistics of the batch, not the given ones.
    options = (False, 0.0, epsilon, "NCHW", False, False)
    y, _, _, mean, deviation, _ = paddle._C_ops.batch_norm(x, *zeros, weight, bias, *options)
    return y, mean, deviation


class _Relu(PyLayer):
    """``relu_``. It keeps the result, as the next layer does; leaky_relu keeps its input besides.

    Batch norms, sums and linear layers, which stand before it, do not need their results.
    """

    @staticmethod
    def forward(ctx: PyLayerContext, x: Tensor) -> Tensor:
        y = F.leaky_relu_(x, 0.0)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: PyLayerContext, grad: Tensor) -> Tensor:
        (y,) = ctx.saved_tensor()
        # 1 above 0, and y itself at 0; a comparison and a cast take three times as long, where ten.
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


class _Linear(PyLayer):
    """x @ weight + bias. x: (..., in), weight: (in, out)."""

    @staticmethod
    def forward(ctx: PyLayerContext, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        rows = x.reshape([-1, x.shape[-1]])
        ctx.save_for_backward(rows, weight)
        ctx.of_x = not x.stop_gradient
        return paddle.addmm(bias, rows, weight).reshape([*x.shape[:-1], weight.shape[1]])

    @staticmethod
    def backward(ctx: PyLayerContext, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        x, weight = ctx.saved_tensor()
        shape = [*grad.shape[:-1], weight.shape[0]]
        grad = grad.reshape([-1, grad.shape[-1]])
        grad_x = None
        if ctx.of_x:  # the codebook's words have no gradient
            grad_x = paddle.matmul(grad, weight, transpose_y=True).reshape(shape)
        return grad_x, paddle.matmul(x, grad, transpose_x=True), sum_rows(grad)
