"""Projector and predictor: linear layers without bias and batch norm."""

import itertools

from oneflow import nn

from triptych.backends.oneflow.layers import BatchNorm, Linear
from triptych.core.config.spec import MocoV3Spec


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


def projector(width: int, spec: MocoV3Spec) -> nn.Sequential:
    """(N, width) -> (N, output_dim)."""
    hidden = [spec.hidden_dim] * (spec.projector_layers - 1)
    return mlp([width, *hidden, spec.output_dim], last_norm=True)


def predictor(spec: MocoV3Spec) -> nn.Sequential:
    """(N, output_dim) -> (N, output_dim)."""
    hidden = [spec.hidden_dim] * (spec.predictor_layers - 1)
    widths = [spec.output_dim, *hidden, spec.output_dim]
    return mlp(widths, last_norm=spec.predictor_last_norm)
