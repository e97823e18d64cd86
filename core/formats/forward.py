"""The forward pass of an encoder on the tensors of a file as they are, in NumPy and float64.

Nothing here uses the tables of names or the changes of values.

Shape letters: N images, L tokens, D width, H heads.
"""

import re
from collections.abc import Mapping

import numpy as np

from triptych.core.config.spec import ModelSpec, VitSpec
from triptych.core.contracts import Array
from triptych.core.files.tree import Stored
from triptych.core.formats.arithmetic import TIMM, Arithmetic, Resnet, Vit
from triptych.core.reference.layers import convolution, gelu, max_pool, relu

EPSILON = 1e-5
"""Of all batch norms."""


class Values:
    """The tensors of a file in float64. Each is read and widened when it is used."""

    def __init__(self, tensors: Mapping[str, Stored]) -> None:
        """Views of these tensors."""
        self._tensors = tensors

    def __getitem__(self, name: str) -> Array:
        """The values of a tensor."""
        return self._tensors[name].array().astype(np.float64)

    def __contains__(self, name: str) -> bool:
        """Whether the file has a tensor."""
        return name in self._tensors

    def count(self, template: str) -> int:
        """How many numbers stand in the place of ``{i}`` in the names that begin so."""
        pattern = re.compile(re.escape(template).replace(r"\{i\}", r"(\d+)"))
        found = (pattern.match(name) for name in self._tensors)
        return len({match[1] for match in found if match})


def features(
    how: Arithmetic, values: Values, branch: str, images: Array, model: ModelSpec
) -> Array:
    """The final tokens of images.

    Args:
        how: the names and layouts of the system.
        values: of the file.
        branch: a key of ``how.prefixes``.
        images: (N, C, height, width).
        model: gives what no tensor shows: heads and the epsilon of layer norms.

    Returns:
        (N, L, D), the class token first. With a norm after the mean of the patches, that mean is
        one more token. A ResNet gives the positions of its last map.
    """
    if isinstance(how, Resnet):
        return _resnet(how, values, how.prefixes[branch], images)
    if not isinstance(model, VitSpec):
        raise TypeError("the spec of a ViT is needed")
    return _Vit(how, values, how.prefixes[branch], model).features(images)


class _Vit:
    """One forward pass."""

    def __init__(self, how: Vit, values: Values, prefix: str, model: VitSpec) -> None:
        self.names = {key: prefix + name for key, name in {**TIMM, **how.names}.items()}
        self.how, self.values, self.model = how, values, model

    def features(self, images: Array) -> Array:
        values, names = self.values, self.names
        patches = self.patches(images)
        token = np.tile(values[names["class token"]].reshape(1, 1, -1), (len(images), 1, 1))
        x: Array = np.concatenate([token, patches], axis=1) + values[names["positions"]]
        for i in range(values.count(f"{names['first norm']}.")):
            x = self.block(i, x)
        if f"{names['last norm']}.weight" in values:
            x = self.norm("last norm", x)
        if f"{names['norm of the mean']}.weight" in values:
            mean = self.norm("norm of the mean", x[:, 1:].mean(axis=1, keepdims=True))
            return np.concatenate([x, mean], axis=1)
        return x

    def patches(self, images: Array) -> Array:
        """(N, C, height, width) -> (N, L, D)."""
        name, values = self.names["patches"], self.values
        if f"{name}.weight" in values:
            weight, bias = values[f"{name}.weight"], values[f"{name}.bias"]
            side = weight.shape[-1]
            n, channels, height, width = images.shape
            cut = images.reshape(n, channels, height // side, side, width // side, side)
            tokens: Array = np.einsum("ncihjw,dchw->nijd", cut, weight, optimize=True) + bias
            return tokens.reshape(n, -1, len(weight))
        x, layers = images, sorted(_layers(name, values))
        for layer in layers[:-1]:
            x = convolution(values[f"{name}.{layer}.weight"], x, stride=2, padding=1)
            x = relu(_batch_norm(values, f"{name}.{layer + 1}", x, self.how.statistics))
        last = f"{name}.{layers[-1]}"
        x = convolution(values[f"{last}.weight"], x) + values[f"{last}.bias"].reshape(1, -1, 1, 1)
        return _positions(x)

    def block(self, i: int, x: Array) -> Array:
        """(N, L, D) -> (N, L, D)."""
        x = x + self.linear("attention", self.mixed(i, self.norm("first norm", x, i)), i)
        hidden: Array = gelu(self.linear("hidden", self.norm("second norm", x, i), i))
        return x + self.linear("output", hidden, i)

    def mixed(self, i: int, x: Array) -> Array:
        """The values that each token attends to. (N, L, D) -> (N, L, D)."""
        n, length, width = x.shape
        heads, how = self.model.heads, self.how.qkv
        if how == "separate":
            three = [self.linear(part, x, i) for part in ("query", "key", "value")]
            q, k, v = (part.reshape(n, length, heads, -1).transpose(0, 2, 1, 3) for part in three)
        else:
            outer = self.linear("query, key, value", x, i)
            shape = (3, heads) if how == "joined" else (heads, 3)
            order = (2, 0, 3, 1, 4) if how == "joined" else (3, 0, 2, 1, 4)
            q, k, v = outer.reshape(n, length, *shape, width // heads).transpose(order)
        scores = q @ k.swapaxes(-1, -2) / np.sqrt(width // heads)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        mixed: Array = (weights / weights.sum(axis=-1, keepdims=True)) @ v
        return mixed.transpose(0, 2, 1, 3).reshape(n, length, width)

    def linear(self, part: str, x: Array, i: int) -> Array:
        """A linear layer."""
        name = self.names[part].format(i=i)
        weight = self.values[f"{name}.weight"]
        y: Array = x @ (weight.T if self.how.linear == "out_in" else weight)
        return y + self.values[f"{name}.bias"] if f"{name}.bias" in self.values else y

    def norm(self, part: str, x: Array, i: int = 0) -> Array:
        """A layer norm."""
        name = self.names[part].format(i=i)
        centred = x - x.mean(axis=-1, keepdims=True)
        deviation = np.sqrt((centred**2).mean(axis=-1, keepdims=True) + self.model.layer_norm_eps)
        normal: Array = centred / deviation * self.values[f"{name}.weight"]
        return normal + self.values[f"{name}.bias"]


def _layers(name: str, values: Values) -> list[int]:
    """The positions of the convolutions in a stem. A norm has as many values as channels."""
    return [i for i in range(99) if f"{name}.{i}.weight" in values
            and values[f"{name}.{i}.weight"].ndim == 4]  # fmt: skip


def _resnet(how: Resnet, values: Values, prefix: str, images: Array) -> Array:
    """(N, C, height, width) -> (N, positions, channels)."""
    conv, norm = (prefix + name for name in how.stem)
    weight = values[f"{conv}.weight"]
    large = weight.shape[-1] > 3
    x = convolution(weight, images, stride=2 if large else 1, padding=weight.shape[-1] // 2)
    x = relu(_batch_norm(values, norm, x, how.statistics))
    x = max_pool(x) if large else x
    for stage, name in enumerate(how.stages):
        for i in range(values.count(f"{prefix}{name}.{{i}}.")):
            x = _block(how, values, f"{prefix}{name}.{i}", x, 2 if stage and not i else 1)
    return _positions(x)


def _positions(x: Array) -> Array:
    """(N, C, H, W) -> (N, H * W, C)."""
    positions: Array = np.swapaxes(x.reshape(*x.shape[:2], -1), 1, 2)
    return positions


def _block(how: Resnet, values: Values, name: str, x: Array, stride: int) -> Array:
    """Two 3x3 convolutions, or three of which the one in the middle is 3x3."""
    count = 3 if f"{name}.conv3.weight" in values else 2
    y = x
    for i in range(1, count + 1):
        weight = values[f"{name}.conv{i}.weight"]
        step = stride if i == count - 1 else 1
        y = convolution(weight, y, stride=step, padding=weight.shape[-1] // 2)
        y = _batch_norm(values, name + how.norm.format(i=i), y, how.statistics)
        y = relu(y) if i < count else y
    conv, norm = (name + end for end in how.shortcut)
    if f"{conv}.weight" in values:
        x = convolution(values[f"{conv}.weight"], x, stride=stride)
        x = _batch_norm(values, norm, x, how.statistics)
    total: Array = relu(x + y)
    return total


def _batch_norm(
    values: Values,
    name: str,
    x: Array,
    statistics: tuple[str, str] = ("running_mean", "running_var"),
) -> Array:
    """A batch norm with its running statistics. (N, C, H, W) -> (N, C, H, W)."""
    names = (*statistics, "weight", "bias")
    mean, variance, weight, bias = (values[f"{name}.{n}"].reshape(1, -1, 1, 1) for n in names)
    normal: Array = (x - mean) / np.sqrt(variance + EPSILON) * weight + bias
    return normal
