"""The description of one canonical tensor, and the tensors of each kind of layer."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True)
class Init:
    """The rule for a tensor's initial value.

    Attributes:
        kind: one of
            "constant": ``value``;
            "uniform": U(-value, value);
            "normal": normal with mean 0 and standard deviation ``value``;
            "sincos": the position table of ``grid``;
            "unit_columns": normal, then each column scaled to length 1;
            "positive_rows": normal, negative values set to 0, then each row scaled to length 1;
            "count": integer 0.
        value: see ``kind``.
        grid: (rows, columns) of patches, for "sincos".
        column_first: for "sincos", whether columns come before rows.
    """

    kind: Literal[
        "constant", "uniform", "normal", "sincos", "unit_columns", "positive_rows", "count"
    ]
    value: float = 0.0
    grid: tuple[int, int] = (0, 0)
    column_first: bool = False


ZEROS, ONES, COUNT = Init("constant", 0.0), Init("constant", 1.0), Init("count")


@dataclass(frozen=True)
class Param:
    """One tensor of the state.

    Attributes:
        name: canonical name.
        shape: canonical shape.
        init: initial value.
        trainable: whether the tensor has a gradient.
        buffer: whether the tensor is no parameter, such as running statistics or a queue.
    """

    name: str
    shape: tuple[int, ...]
    init: Init
    trainable: bool = True
    buffer: bool = False

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class ConvNorm:
    """A square convolution without bias, and the batch norm after it.

    The padding is half the kernel, so an image keeps its size at stride 1.

    Attributes:
        conv: name of the convolution.
        norm: name of the batch norm.
        fan_in: input channels.
        fan_out: output channels.
        kernel: side of the kernel, pixels.
        stride: pixels.
    """

    conv: str
    norm: str
    fan_in: int
    fan_out: int
    kernel: int
    stride: int = 1

    @property
    def padding(self) -> int:
        """Number of zeros on each side."""
        return self.kernel // 2

    def params(self, init: Init, gain: Init = ONES) -> list[Param]:
        """The tensors of both layers.

        Args:
            init: initial value of the kernel.
            gain: initial value of the norm's gain.
        """
        shape = (self.fan_out, self.fan_in, self.kernel, self.kernel)
        return [
            Param(f"{self.conv}.weight", shape, init),
            *batch_norm(self.norm, self.fan_out, gain=gain),
        ]


def linear(
    name: str, fan_in: int, fan_out: int, init: Init, bias: Init | None = ZEROS
) -> list[Param]:
    """The weight (out, in) of a linear layer, and its bias unless ``bias`` is None."""
    weight = Param(f"{name}.weight", (fan_out, fan_in), init)
    return [weight] if bias is None else [weight, Param(f"{name}.bias", (fan_out,), bias)]


def norm(name: str, width: int, gain: Init = ONES) -> list[Param]:
    """The gain and shift of a norm."""
    return [Param(f"{name}.weight", (width,), gain), Param(f"{name}.bias", (width,), ZEROS)]


def batch_norm(name: str, width: int, *, affine: bool = True, gain: Init = ONES) -> list[Param]:
    """The tensors of a batch norm.

    They are gain and shift (if ``affine``), running statistics, and the number of batches seen.
    """
    statistics = (
        ("running_mean", (width,), ZEROS),
        ("running_var", (width,), ONES),
        ("num_batches_tracked", (), COUNT),
    )
    return [
        *(norm(name, width, gain) if affine else []),
        *(Param(f"{name}.{end}", s, i, trainable=False, buffer=True) for end, s, i in statistics),
    ]


def torch_default(fan_in: int) -> Init:
    """The initial value of PyTorch's linear and convolution layers, for weight and bias."""
    return Init("uniform", 1.0 / math.sqrt(fan_in))


def xavier(fan_in: int, fan_out: int) -> Init:
    """Xavier-uniform (Glorot and Bengio 2010)."""
    return Init("uniform", math.sqrt(6.0 / (fan_in + fan_out)))


def prefixed(prefix: str, params: Iterable[Param]) -> list[Param]:
    """The same tensors with a prefix before their names."""
    return [replace(p, name=prefix + p.name) for p in params]
