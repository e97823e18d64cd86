"""Projector and predictor: linear layers, with or without batch norm."""

import itertools

from oneflow import nn

from triptych.backends.oneflow.layers import BatchNorm, Linear
from triptych.core import parameters
from triptych.core.config.spec import MethodSpec, MocoV3Spec, QueueSpec


def projector(width: int, spec: MethodSpec) -> nn.Sequential:
    """(N, width) -> (N, output_dim)."""
    widths = parameters.projector_widths(width, spec)
    return plain_mlp(widths) if isinstance(spec, QueueSpec) else mlp(widths, last_norm=True)


def predictor(spec: MocoV3Spec) -> nn.Sequential:
    """(N, output_dim) -> (N, output_dim)."""
    return mlp(parameters.predictor_widths(spec), last_norm=spec.predictor_last_norm)


def mlp(widths: list[int], *, last_norm: bool) -> nn.Sequential:
    """Linear, norm, relu, ..., linear, and at the end a norm without gain and shift where asked.

    Args:
        widths: of the input, the hidden layers and the output.
    """
    layers: list[nn.Module] = []
    for fan_in, fan_out in itertools.pairwise(widths[:-1]):
        layers += [Linear(fan_in, fan_out, bias=False), BatchNorm(fan_out), nn.ReLU()]
    layers.append(Linear(widths[-2], widths[-1], bias=False))
    if last_norm:
        layers.append(BatchNorm(widths[-1], affine=False))
    return nn.Sequential(*layers)


def plain_mlp(widths: list[int]) -> nn.Sequential:
    """Linear layers with bias, and relu between them.

    Args:
        widths: as in ``mlp``.
    """
    layers: list[nn.Module] = []
    for fan_in, fan_out in itertools.pairwise(widths):
        layers += [Linear(fan_in, fan_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])
