"""The tensors of projectors, predictors and queue, and the widths of their layers."""

import itertools
from typing import TypeAlias

from triptych.core.config.spec import MethodSpec, MocoV2Spec, MocoV3Spec, QueueSpec
from triptych.core.parameters.param import (
    COUNT,
    ZEROS,
    Init,
    Param,
    batch_norm,
    linear,
    torch_default,
    xavier,
)

ContrastiveSpec: TypeAlias = QueueSpec | MocoV3Spec
"""Methods that project: all but MOCA."""


def projector(width: int, spec: ContrastiveSpec) -> list[Param]:
    """What stands behind an encoder, in student and teacher. width: of the encoder's feature."""
    widths = projector_widths(width, spec)
    if isinstance(spec, QueueSpec):
        return _plain(widths, spec)
    return _normed(widths, last_norm=True)


def predictor(spec: MethodSpec) -> list[Param]:
    """What stands behind the student's projector: nothing in MoCo v1 and v2."""
    if not isinstance(spec, MocoV3Spec):
        return []
    return _normed(predictor_widths(spec), last_norm=spec.predictor_last_norm)


def memory(spec: MethodSpec) -> list[Param]:
    """The queue, (output_dim, queue_size) with a key in each column, and where it goes on."""
    if not isinstance(spec, QueueSpec):
        return []
    shape = (spec.output_dim, spec.queue_size)
    return [
        Param("queue", shape, Init("unit_columns"), trainable=False, buffer=True),
        Param("pointer", (), COUNT, trainable=False, buffer=True),
    ]


def projector_widths(width: int, spec: ContrastiveSpec) -> list[int]:
    """Widths of input, hidden layers and output."""
    if isinstance(spec, MocoV3Spec):
        return [width, *[spec.hidden_dim] * (spec.projector_layers - 1), spec.output_dim]
    hidden = [spec.hidden_dim or width] if isinstance(spec, MocoV2Spec) else []
    return [width, *hidden, spec.output_dim]


def predictor_widths(spec: MocoV3Spec) -> list[int]:
    """Widths of input, hidden layers and output."""
    return [spec.output_dim, *[spec.hidden_dim] * (spec.predictor_layers - 1), spec.output_dim]


def _plain(widths: list[int], spec: QueueSpec) -> list[Param]:
    """Linear layers with bias, and ReLU between them: MoCo v2, or with one layer MoCo v1."""
    params: list[Param] = []
    last = len(widths) - 2
    for i, (fan_in, fan_out) in enumerate(itertools.pairwise(widths)):
        weight = bias = torch_default(fan_in)
        if spec.head_init == "paddle":
            weight = Init("normal", 0.01) if i == last else xavier(fan_in, fan_out)
            bias = ZEROS
        params += linear(f"{2 * i}", fan_in, fan_out, weight, bias)
    return params


def _normed(widths: list[int], *, last_norm: bool) -> list[Param]:
    """Linear layers without bias, each followed by batch norm; the last has no gain or shift."""
    params: list[Param] = []
    last = len(widths) - 2
    for i, (fan_in, fan_out) in enumerate(itertools.pairwise(widths)):
        params += linear(f"{3 * i}", fan_in, fan_out, torch_default(fan_in), None)
        if i < last or last_norm:
            params += batch_norm(f"{3 * i + 1}", fan_out, affine=i < last)
    return params
