"""The plans of the heads after an encoder, from which every backend builds, and their tensors."""

import itertools
from collections.abc import Sequence
from typing import Literal, NamedTuple

from triptych.core.parameters.param import (
    ZEROS,
    Init,
    Param,
    batch_norm,
    linear,
    torch_default,
    xavier,
)


class Layer(NamedTuple):
    """One layer of a head.

    Attributes:
        kind: one of
            "linear": linear layer without bias;
            "biased": linear layer with bias;
            "norm": batch norm;
            "plain_norm": batch norm without gain and shift;
            "relu": ReLU.
        fan_in: input width.
        fan_out: output width.
    """

    kind: Literal["linear", "biased", "norm", "plain_norm", "relu"]
    fan_in: int
    fan_out: int


class Head(NamedTuple):
    """A sequence of layers. The name of a layer is its position.

    Attributes:
        layers: in forward order.
        init: initial values of layers with bias: "torch" as in PyTorch's linear layer, "paddle" as
            in PaddleFleetX.
    """

    layers: tuple[Layer, ...] = ()
    init: Literal["torch", "paddle"] = "torch"


def plain(widths: Sequence[int], init: Literal["torch", "paddle"]) -> Head:
    """Linear layers with bias, and ReLU between them.

    Args:
        widths: of the input, the hidden layers and the output.
        init: as in ``Head``.
    """
    layers: list[Layer] = []
    for fan_in, fan_out in itertools.pairwise(widths):
        layers += [Layer("biased", fan_in, fan_out), Layer("relu", fan_out, fan_out)]
    return Head(tuple(layers[:-1]), init)


def normed(widths: Sequence[int], last: Literal["norm", "plain_norm"] | None) -> Head:
    """Linear layers without bias, and batch norm and ReLU between them.

    Args:
        widths: as in ``plain``.
        last: kind of the batch norm after the last linear layer; None: no batch norm.
    """
    layers: list[Layer] = []
    for fan_in, out in itertools.pairwise(widths):
        layers += [Layer("linear", fan_in, out), Layer("norm", out, out), Layer("relu", out, out)]
    end = [Layer(last, widths[-1], widths[-1])] if last else []
    return Head((*layers[:-2], *end))


def head_params(head: Head) -> list[Param]:
    """The tensors of a head, in forward order."""
    params: list[Param] = []
    for i, (kind, fan_in, fan_out) in enumerate(head.layers):
        if kind == "linear":
            params += linear(f"{i}", fan_in, fan_out, torch_default(fan_in), None)
        elif kind == "biased":
            weight = bias = torch_default(fan_in)
            if head.init == "paddle":
                last = i == len(head.layers) - 1
                weight, bias = Init("normal", 0.01) if last else xavier(fan_in, fan_out), ZEROS
            params += linear(f"{i}", fan_in, fan_out, weight, bias)
        elif kind != "relu":
            params += batch_norm(f"{i}", fan_out, affine=kind == "norm")
    return params


def head_flops(head: Head) -> int:
    """Multiply-adds of a head's linear layers for one image."""
    return sum(n.fan_in * n.fan_out for n in head.layers if n.kind in ("linear", "biased"))
