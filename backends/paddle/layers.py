"""Replacements of layers that are slow or inexact on Paddle's CPU, made of Paddle's operations.

Operations on rows are fast in Paddle unless they broadcast or sum over rows. Therefore vectors are
expanded first, and a sum over rows is a matrix product with ones.

Shape letters: N rows, D columns.
"""

import math

import paddle
import paddle.nn.functional as F
from paddle import ParamAttr, Tensor, nn
from paddle.nn.initializer import Constant

from triptych.backends.paddle.kernels import (
    GRADIENT_KERNELS,
    batch_norm,
    biased_product,
    gelu,
    layer_norm,
    rectified_,
    scale_shift,
    shared_norm,
    statistics_dtype,
)
from triptych.core.config.spec import BatchNormSpec
from triptych.core.contracts import Group

EPSILON = 2.0**-16
"""The epsilon that a norm's kernel gets (see ``exact_epsilon``).

It is a power of two between 1e-5, the least that older versions of cuDNN accept, and 1e-3, the most
that Paddle accepts.
"""


def plain_forms_serve(x: Tensor) -> bool:
    """Whether to use Paddle's own layers: on a GPU, and in a graph for export.

    They are fast on a GPU. They make an exported graph smaller.
    """
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
        if x.dtype == paddle.float32 and GRADIENT_KERNELS:
            return layer_norm(x, self.weight, self.bias, epsilon)
        # Batch norm with each row as a channel computes the same numbers and has a faster backward
        # pass. In float64 this form stays, since another one would change the bits of all runs.
        rows = x.reshape([1, -1, x.shape[-1]])
        mean, variance = (paddle.zeros([rows.shape[1]], statistics_dtype(x)) for _ in range(2))
        normal = F.batch_norm(
            rows, mean, variance, None, None, training=True, momentum=0.0, epsilon=epsilon
        )
        rows = normal.reshape([-1, x.shape[-1]])
        return scale_shift(rows, self.weight, self.bias).reshape(x.shape)


class BatchNorm(nn.Layer):
    """Batch norm with virtual ranks in training.

    Each of ``virtual_ranks`` contiguous parts of a training batch is normalised separately. The
    running statistics are those of the first part, which the first rank would save. They stay as
    they are while ``tracking`` is False. Unlike in Paddle's batch norm, they are buffers and no
    parameters. The running variance is unbiased unless ``biased`` is set.

    Args:
        momentum: weight of the new batch in the running statistics.
        epsilon: added to the variance.
    """

    virtual_ranks = 1
    biased = False
    group = Group()
    tracking = True

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
        """Normalises over all axes but the second. (N, D, ...) -> (N, D, ...).

        Raises:
            ValueError: in training, a channel has one value only. Paddle would return it unchanged.
        """
        if not self.training:
            factor, epsilon = exact_epsilon(self.epsilon, x)
            mean, variance = self.running_mean * factor, self.running_var * factor**2
            x = x if factor == 1.0 else x * factor
            return F.batch_norm(x, mean, variance, self.weight, self.bias, epsilon=epsilon)
        if self.virtual_ranks == 1:
            return self._normalise(x, track=self.tracking)
        first, *others = paddle.split(x, self.virtual_ranks)
        parts = [self._normalise(first, track=self.tracking)]
        parts += [self._normalise(part, track=False) for part in others]
        return paddle.concat(parts)

    def _normalise(self, x: Tensor, *, track: bool) -> Tensor:
        """Normalises by the statistics of ``x``. If ``track`` is set, updates the running ones."""
        count = math.prod(x.shape) // x.shape[1]
        if count * self.group.count == 1:
            raise ValueError(f"batch norm: more than one value per channel needed, got {x.shape}")
        factor, epsilon = exact_epsilon(self.epsilon, x)
        x = x if factor == 1.0 else x * factor
        if self.group.count > 1:
            y, mean, variance, count = shared_norm(x, self.weight, self.bias, epsilon, self.group)
        else:
            y, mean, variance = batch_norm(x, self.weight, self.bias, epsilon)
        if track:
            self._move(mean, variance, count, factor)
        return y

    @paddle.no_grad()
    def _move(self, mean: Tensor, variance: Tensor, count: int, factor: float) -> None:
        """Moves the running statistics.

        Args:
            mean: (D,), of the batch times ``factor``.
            variance: (D,), likewise.
            count: number of values per channel.
        """
        m = self.momentum
        share = m / factor**2 * count / (count if self.biased else count - 1)
        self.running_mean.scale_(1.0 - m).add_(mean * (m / factor))
        self.running_var.scale_(1.0 - m).add_(variance * share)
        paddle.increment(self.num_batches_tracked)


def set_batch_norm(model: nn.Layer, spec: BatchNormSpec, group: Group) -> None:
    """Applies the section ``batch_norm`` to all batch norms in a module."""
    for layer in model.sublayers():
        if isinstance(layer, BatchNorm):
            layer.virtual_ranks = spec.virtual_ranks
            layer.biased = spec.running_variance == "biased"
            layer.group = group


def set_tracking(model: nn.Layer, flag: bool) -> None:
    """Sets whether the batch norms in a module move their running statistics."""
    for layer in model.sublayers():
        if isinstance(layer, BatchNorm):
            layer.tracking = flag


def exact_epsilon(epsilon: float, x: Tensor) -> tuple[float, float]:
    """A factor for ``x`` and the epsilon that normalises the product as ``epsilon`` does ``x``.

    The kernels round epsilon to float32. That is an error of 1e-9 if the variance is smaller than
    epsilon, as it is for a class token at the start. The kernels also reject an epsilon above 1e-3.
    Since norm(x, e) = norm(c x, c^2 e), a factor c can make c^2 e a power of two.
    """
    if x.dtype != paddle.float64 and epsilon <= 1e-3:
        return 1.0, epsilon
    return math.sqrt(EPSILON / epsilon), EPSILON


class Gelu(nn.Layer):
    """x Phi(x), with the exact normal distribution Phi."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape."""
        # float64 keeps its bits.
        if x.dtype != paddle.float32 or plain_forms_serve(x):
            return F.gelu(x)
        return gelu(x)


class ReLU(nn.Layer):
    """``relu_`` as a layer. It overwrites its input, as PyTorch's in-place module does."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape."""
        return relu_(x)


def relu_(x: Tensor) -> Tensor:
    """max(x, 0) in place. nan stays nan. Any shape.

    ``F.relu`` turns nan into 0: a network with nan would go on training at the chance level.
    """
    return rectified_(x) if paddle.in_dynamic_mode() else F.leaky_relu(x, 0.0)


def max_pool(x: Tensor) -> Tensor:
    """Maximum of each 3x3 square, stride 2, padding 1; a map of nan stays nan. (N, C, H, W)."""
    # With the indices of the maxima (return_mask), the backward pass takes a fifth of the time. But
    # the index of a square of nan is -1: its gradient would be written outside of the array.
    if plain_forms_serve(x) or not math.isfinite(float(x.detach().sum())):
        return F.max_pool2d(x, 3, 2, 1)
    return F.max_pool2d(x, 3, 2, 1, return_mask=True)[0]


class Linear(nn.Linear):
    """Paddle's linear layer with weight (in, out). Its initial values come with the state."""

    def __init__(self, fan_in: int, fan_out: int, *, bias: bool = True) -> None:
        zeros = ParamAttr(initializer=Constant(0.0))
        super().__init__(fan_in, fan_out, weight_attr=zeros, bias_attr=None if bias else False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return linear(x, self.weight, self.bias)


class Conv2D(nn.Conv2D):
    """Paddle's square convolution. Its initial values come with the state."""

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
        # Not super(): Paddle 2.6 cannot resolve it when it converts this method to a graph.
        if not self.pointwise or plain_forms_serve(x):
            return nn.Conv2D.forward(self, x)
        fan_out, fan_in = self.weight.shape[:2]
        positions = math.prod(-(-side // self.stride) for side in x.shape[2:])
        # Paddle multiplies image by image, and adds to the gradient of the weight each time. If the
        # weight is much larger than the maps, one product for all images is faster.
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
    """``F.linear`` with faster ways to add the bias and to sum its gradient."""
    if bias is None or plain_forms_serve(x):
        return F.linear(x, weight, bias)
    return biased_product(x, weight, bias)


def linear_weights(model: nn.Layer) -> frozenset[str]:
    """Names of the weights that Paddle keeps as (in, out).

    The class of the layer decides: the shape of a square weight says nothing.
    """
    return frozenset(
        f"{path}.weight" for path, layer in model.named_sublayers() if isinstance(layer, nn.Linear)
    )


class PatchEmbed(nn.Layer):
    """One token per square patch."""

    def __init__(self, channels: int, width: int, patch_size: int) -> None:
        super().__init__()
        self.proj: nn.Layer = Conv2D(channels, width, patch_size, patch_size)

    def forward(self, images: Tensor) -> Tensor:
        """Returns the patches in row-major order. (N, C, H, W) -> (N, L, D)."""
        return self.proj(images).flatten(2).transpose([0, 2, 1])


def unit_rows(x: Tensor, eps: float) -> Tensor:
    """x / max(|x|, eps). It is float32 for half precision, too. (N, D)."""
    # F.normalize gives the same numbers and takes ten times as long.
    x = x if x.dtype == statistics_dtype(x) else x.astype(statistics_dtype(x))
    return x * paddle.rsqrt(paddle.clip((x * x).sum(-1, keepdim=True), min=eps * eps))


def pick_tokens(x: Tensor, ids: Tensor) -> Tensor:
    """result[n, i] = x[n, ids[n, i]]. If x has one image only, it is used for every n.

    Args:
        x: (N, L, D) or (1, L, D).
        ids: (N, T) int64.
    """
    n, length, width = x.shape
    rows = ids if n == 1 else ids + (paddle.arange(n, dtype=ids.dtype) * length).unsqueeze(1)
    picked = paddle.gather(x.reshape([-1, width]), rows.flatten())
    return picked.reshape([*ids.shape, width])


def like_tokens(scale: Tensor, x: Tensor) -> Tensor:
    """Repeats a factor of each image for all its tokens. (N, 1, 1), (N, T, D) -> (N, T, D)."""
    return scale.expand_as(x)
