"""One canonical tensor, and the small groups that layers are made of."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True)
class Init:
    """How a tensor starts.

    constant: ``value``. uniform: U(-value, value). normal: N(0, value), ``value`` the standard
    deviation. sincos: the position table of a ``grid``, row first or column first. unit_columns:
    normal, each column scaled to length 1. positive_rows: normal, negative values set to 0, each
    row scaled to length 1. count: integer zeros.
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
    """One tensor. trainable: has a gradient; buffer: no parameter at all (statistics, queue)."""

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
    """A square convolution without bias, and the batch norm behind it, by their names.

    The padding is half the kernel: with stride 1 an image keeps its size.
    """

    conv: str
    norm: str
    fan_in: int
    fan_out: int
    kernel: int
    stride: int = 1

    @property
    def padding(self) -> int:
        """Zeros on each side."""
        return self.kernel // 2

    def params(self, init: Init, gain: Init = ONES) -> list[Param]:
        """Both layers' tensors.

        Args:
            init: of the kernel.
            gain: of the norm's gain.
        """
        shape = (self.fan_out, self.fan_in, self.kernel, self.kernel)
        return [
            Param(f"{self.conv}.weight", shape, init),
            *batch_norm(self.norm, self.fan_out, gain=gain),
        ]


def linear(
    name: str, fan_in: int, fan_out: int, init: Init, bias: Init | None = ZEROS
) -> list[Param]:
    """Weight (out, in) and, unless None, bias."""
    weight = Param(f"{name}.weight", (fan_out, fan_in), init)
    return [weight] if bias is None else [weight, Param(f"{name}.bias", (fan_out,), bias)]


def norm(name: str, width: int, gain: Init = ONES) -> list[Param]:
    """Gain and shift."""
    return [Param(f"{name}.weight", (width,), gain), Param(f"{name}.bias", (width,), ZEROS)]


def batch_norm(name: str, width: int, *, affine: bool = True, gain: Init = ONES) -> list[Param]:
    """Gain and shift where ``affine``, running statistics, and the number of batches seen."""
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
    """What PyTorch's linear and convolution layers start with, weight and bias alike."""
    return Init("uniform", 1.0 / math.sqrt(fan_in))


def xavier(fan_in: int, fan_out: int) -> Init:
    """Xavier-uniform (Glorot and Bengio 2010)."""
    return Init("uniform", math.sqrt(6.0 / (fan_in + fan_out)))


def prefixed(prefix: str, params: Iterable[Param]) -> list[Param]:
    """The same tensors with longer names."""
    return [replace(p, name=prefix + p.name) for p in params]
