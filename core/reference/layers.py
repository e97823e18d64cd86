"""Layers as functions of (values by canonical name, input).

Shape letters: N images, D width, C channels.
"""

import itertools
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

import autograd.numpy as np
from autograd.extend import defvjp, primitive
from autograd.scipy.special import erf
from autograd.tracer import getval

from triptych.core.config.spec import BatchNormSpec
from triptych.core.contracts import ALONE, Group, Tensor
from triptych.core.parameters import Head

Values = Mapping[str, Tensor]


@dataclass(frozen=True)
class Norms:
    """The mode of the batch norms.

    Attributes:
        training: whether to normalise with the statistics of the batch and update the running
            statistics. If not, the running statistics normalise.
        virtual_ranks: number of parts of the batch, each of which is normalised separately.
        biased: whether the biased variance enters the running variance.
        tracking: whether to update the running statistics in training.
        group: the processes that share the statistics of their batches. If there are several, they
            have one virtual rank each.
    """

    training: bool
    virtual_ranks: int = 1
    biased: bool = False
    tracking: bool = True
    group: Group = ALONE.norms

    @classmethod
    def of(cls, spec: BatchNormSpec, parts: int, group: Group) -> "Norms":
        """The mode of a training step under the section ``batch_norm``.

        Args:
            parts: number of equal parts into which processes and micro-batches divide the batch.
            group: as in the attributes.
        """
        ranks = max(1, spec.virtual_ranks // parts)
        return cls(True, ranks, spec.running_variance == "biased", group=group)


TRAINING, EVALUATION = Norms(True), Norms(False)


def linear(values: Values, name: str, x: Tensor) -> Tensor:
    """x W^T + b. (..., in) -> (..., out)."""
    y = x @ values[f"{name}.weight"].T
    return y + values[f"{name}.bias"] if f"{name}.bias" in values else y


def layer_norm(values: Values, name: str, x: Tensor, eps: float) -> Tensor:
    """Layer norm over the last axis with the biased variance (arXiv 1607.06450)."""
    centred = x - np.mean(x, axis=-1, keepdims=True)
    variance = np.mean(centred * centred, axis=-1, keepdims=True)
    normal = centred / np.sqrt(variance + eps)
    return normal * values[f"{name}.weight"] + values[f"{name}.bias"]


def gelu(x: Tensor) -> Tensor:
    """x Phi(x), without approximation (arXiv 1606.08415)."""
    return x * 0.5 * (1.0 + erf(x / np.sqrt(2.0)))


def relu(x: Tensor) -> Tensor:
    """max(x, 0) with derivative 0 at 0. A nan stays nan."""
    # The derivative of np.maximum at 0 is 1/2. A residual sum can be exactly 0 if the last gain is.
    return np.where(x <= 0.0, 0.0, x)


def batch_norm(
    values: MutableMapping[str, Tensor],
    name: str,
    x: Tensor,
    norms: Norms,
    *,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Batch norm over all axes of (N, C, ...) but the second (arXiv 1502.03167).

    In training, the mean and the biased variance of the batch normalise. The running statistics
    move by ``momentum`` towards the mean and the unbiased variance, or the biased one if
    ``norms`` says so. With virtual ranks, only the
    first rank moves them, since a distributed run would save the statistics of that rank.
    """
    shape = (1, -1, *[1] * (x.ndim - 2))
    axes = (0, *range(2, x.ndim))
    if norms.training:
        parts = np.split(x, norms.virtual_ranks)
        count = _total(np.array(parts[0].size // x.shape[1]), norms.group)
        means = [_mean(part, axes, norms.group, count) for part in parts]
        centred = [part - mean for part, mean in zip(parts, means, strict=True)]
        variances = [_mean(c * c, axes, norms.group, count) for c in centred]
        if norms.tracking:
            n = int(count)
            variance = variances[0] if norms.biased else variances[0] * n / (n - 1)
            for key, batch in (("mean", means[0]), ("var", variance)):
                running, new = f"{name}.running_{key}", np.reshape(getval(batch), -1)
                values[running] = (1.0 - momentum) * values[running] + momentum * new
            values[f"{name}.num_batches_tracked"] = values[f"{name}.num_batches_tracked"] + 1
        pairs = zip(centred, variances, strict=True)
        normal = np.concatenate([c / np.sqrt(variance + eps) for c, variance in pairs])
    else:
        mean, variance = (np.reshape(values[f"{name}.running_{k}"], shape) for k in ("mean", "var"))
        normal = (x - mean) / np.sqrt(variance + eps)
    if f"{name}.weight" not in values:
        return normal
    gain, shift = (np.reshape(values[f"{name}.{k}"], shape) for k in ("weight", "bias"))
    return normal * gain + shift


def _sum(x: Tensor, group: Group) -> Tensor:
    """The sum over a group of processes. Its gradient is the sum of theirs."""
    return group.sum(x)


_total = primitive(_sum)
defvjp(_total, lambda result, x, group: lambda gradient: group.sum(gradient))


def _mean(x: Tensor, axes: tuple[int, ...], group: Group, count: Tensor) -> Tensor:
    """The mean over axes and over the processes of a group. count: number of its values."""
    if group.count == 1:
        return np.mean(x, axis=axes, keepdims=True)
    return _total(np.sum(x, axis=axes, keepdims=True), group) / count


def head(
    values: MutableMapping[str, Tensor], name: str, x: Tensor, plan: Head, norms: Norms
) -> Tensor:
    """Projector or predictor. (N, input width) -> (N, output width)."""
    for i, layer in enumerate(plan.layers):
        if layer.kind == "relu":
            x = relu(x)
        elif layer.kind in ("linear", "biased"):
            x = linear(values, f"{name}.{i}", x)
        else:
            x = batch_norm(values, f"{name}.{i}", x, norms)
    return x


def convolution(weight: Tensor, x: Tensor, *, stride: int = 1, padding: int = 0) -> Tensor:
    """Convolution as a sum of matrix products, one for each position in the kernel.

    Args:
        weight: (out, in, kh, kw).
        x: (N, in, H, W).
        stride: step of the kernel, pixels.
        padding: zeros on each side, pixels.
    """
    n, channels, *size = x.shape
    out, _, *kernel = weight.shape
    x = np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding)), "constant")
    height, width = ((s + 2 * padding - k) // stride + 1 for s, k in zip(size, kernel, strict=True))
    y = 0.0
    for i, j in itertools.product(*map(range, kernel)):
        pixels = _strided(x, i, j, height, width, stride)
        y = y + weight[:, :, i, j] @ np.reshape(pixels, (n, channels, height * width))
    return np.reshape(y, (n, out, height, width))


def max_pool(x: Tensor) -> Tensor:
    """Maximum over each 3x3 square with stride 2 and padding 1. x: (N, C, H, W).

    Among equal maxima the first one, row by row, gets the gradient. A nan stays nan.
    """
    height, width = ((side - 1) // 2 + 1 for side in x.shape[2:])
    x = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)), "constant", constant_values=-np.inf)
    corners = itertools.product(range(3), range(3))
    y, *others = (_strided(x, i, j, height, width, 2) for i, j in corners)
    for other in others:
        y = np.where((other > y) | (other != other), other, y)
    return y


def _strided(x: Tensor, i: int, j: int, height: int, width: int, stride: int) -> Tensor:
    return x[:, :, i : i + stride * height : stride, j : j + stride * width : stride]
