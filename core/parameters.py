"""The canonical tensors of a run: names, shapes, initial values and who is trained.

Names are timm's (ViT) under ``student.encoder.``; heads count their layers as in a sequential
module (linear 0, norm 1, relu 2, linear 3, ...). Layouts are PyTorch's: linear (out, in),
convolution (out, in, kh, kw). The teacher repeats encoder and projector under ``teacher.``.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from triptych.core.config.spec import MocoV3Spec, RunSpec, VitSpec
from triptych.core.engine import Array, State
from triptych.core.random import stream


@dataclass(frozen=True)
class Init:
    """How a tensor starts: ``value``, U(-value, value), N(0, value), or the sin-cos table."""

    kind: Literal["constant", "uniform", "normal", "sincos"]
    value: float = 0.0
    grid: tuple[int, int] = (0, 0)


ZEROS, ONES = Init("constant", 0.0), Init("constant", 1.0)


@dataclass(frozen=True)
class Param:
    """One tensor. trainable: has a gradient; buffer: running statistics, no parameter at all."""

    name: str
    shape: tuple[int, ...]
    init: Init
    trainable: bool = True
    buffer: bool = False

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


def table(spec: RunSpec) -> list[Param]:
    """All tensors of student and teacher, in forward order."""
    student = [
        *_prefixed("student.encoder.", vit(spec.model)),
        *_prefixed("student.projector.", projector(spec.model.width, spec.method)),
    ]
    teacher = [
        replace(p, name=p.name.replace("student.", "teacher.", 1), trainable=False) for p in student
    ]
    return [*student, *_prefixed("student.predictor.", predictor(spec.method)), *teacher]


def initial_state(spec: RunSpec) -> State:
    """Initial values of ``table(spec)`` from the spec's seed, float32 (buffers of counts int64).

    Every tensor has a stream of its own, so a change of architecture moves no other tensor. The
    teacher starts as a copy of the student.
    """
    state: State = {}
    for param in table(spec):
        source = param.name.replace("teacher.", "student.", 1)
        state[param.name] = (
            state[source].copy() if source != param.name else initial_value(param, spec.seed)
        )
    return state


def initial_value(param: Param, seed: int) -> Array:
    """Draws one tensor in float64 and rounds it to float32, so that all precisions start alike."""
    init = param.init
    if param.name.endswith("num_batches_tracked"):
        return np.zeros(param.shape, np.int64)
    if init.kind == "constant":
        return np.full(param.shape, init.value, np.float32)
    if init.kind == "sincos":
        return sincos_2d(*init.grid, param.shape[-1])
    rng = stream(seed, f"init/{param.name}")
    if init.kind == "uniform":
        return rng.uniform(-init.value, init.value, param.shape).astype(np.float32)
    return (rng.standard_normal(param.shape) * init.value).astype(np.float32)


def sincos_2d(rows: int, columns: int, width: int) -> Array:
    """MoCo v3's position table: class token zero, then row-major patches.

    The patch at (r, c) holds [sin(r w), cos(r w), sin(c w), cos(c w)], each of width/4 channels,
    with w_k = 10000^(-k / (width/4)). (1, 1 + rows*columns, width), float32.
    """
    omega = 10000.0 ** (-np.arange(width // 4) / (width // 4))
    r, c = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
    row, column = r.reshape(-1, 1) * omega, c.reshape(-1, 1) * omega
    patches = np.concatenate([np.sin(row), np.cos(row), np.sin(column), np.cos(column)], axis=1)
    table: Array = np.concatenate([np.zeros((1, width)), patches])[None].astype(np.float32)
    return table


def vit(spec: VitSpec) -> list[Param]:
    """The encoder's tensors with MoCo v3's initial values (the reference's own bounds)."""
    d, hidden = spec.width, spec.width * spec.mlp_ratio
    fan_in = spec.channels * spec.patch_size**2
    free = not spec.freeze_patch_embed
    params = [
        Param("cls_token", (1, 1, d), Init("normal", 1e-6)),
        Param(
            "pos_embed",
            (1, 1 + math.prod(spec.grid), d),
            Init("sincos", grid=spec.grid),
            trainable=False,
        ),
        Param(
            "patch_embed.proj.weight",
            (d, spec.channels, spec.patch_size, spec.patch_size),
            _xavier(fan_in, d),
            trainable=free,
        ),
        Param("patch_embed.proj.bias", (d,), ZEROS, trainable=free),
    ]
    for i in range(spec.depth):
        block = f"blocks.{i}."
        params += [
            *_norm(block + "norm1", d),
            # Query, key and value are three D x D matrices for the bound.
            *_linear(block + "attn.qkv", d, 3 * d, _xavier(d, d)),
            *_linear(block + "attn.proj", d, d, _xavier(d, d)),
            *_norm(block + "norm2", d),
            *_linear(block + "mlp.fc1", d, hidden, _xavier(d, hidden)),
            *_linear(block + "mlp.fc2", hidden, d, _xavier(hidden, d)),
        ]
    return [*params, *_norm("norm", d)]


def projector(width: int, spec: MocoV3Spec) -> list[Param]:
    """Linear layers without bias, each followed by batch norm; the last has no gain or shift."""
    return list(_mlp(projector_widths(width, spec), last_norm=True))


def predictor(spec: MocoV3Spec) -> list[Param]:
    """As the projector, from the output width; the last norm only where the spec says so."""
    return list(_mlp(predictor_widths(spec), last_norm=spec.predictor_last_norm))


def projector_widths(width: int, spec: MocoV3Spec) -> list[int]:
    """Widths of input, hidden layers and output."""
    return [width, *[spec.hidden_dim] * (spec.projector_layers - 1), spec.output_dim]


def predictor_widths(spec: MocoV3Spec) -> list[int]:
    """Widths of input, hidden layers and output."""
    return [spec.output_dim, *[spec.hidden_dim] * (spec.predictor_layers - 1), spec.output_dim]


def _mlp(widths: list[int], *, last_norm: bool) -> Iterator[Param]:
    last = len(widths) - 2
    for i, (fan_in, fan_out) in enumerate(itertools.pairwise(widths)):
        bound = 1.0 / math.sqrt(fan_in)  # PyTorch's default for a linear layer
        yield Param(f"{3 * i}.weight", (fan_out, fan_in), Init("uniform", bound))
        if i < last or last_norm:
            yield from _batch_norm(f"{3 * i + 1}", fan_out, affine=i < last)


def _batch_norm(name: str, width: int, *, affine: bool = True) -> Iterator[Param]:
    if affine:
        yield from _norm(name, width)
    for suffix, shape, init in (
        ("running_mean", (width,), ZEROS),
        ("running_var", (width,), ONES),
        ("num_batches_tracked", (), ZEROS),
    ):
        yield Param(f"{name}.{suffix}", shape, init, trainable=False, buffer=True)


def _norm(name: str, width: int) -> list[Param]:
    return [Param(f"{name}.weight", (width,), ONES), Param(f"{name}.bias", (width,), ZEROS)]


def _linear(name: str, fan_in: int, fan_out: int, init: Init) -> list[Param]:
    return [
        Param(f"{name}.weight", (fan_out, fan_in), init),
        Param(f"{name}.bias", (fan_out,), ZEROS),
    ]


def _xavier(fan_in: int, fan_out: int) -> Init:
    return Init("uniform", math.sqrt(6.0 / (fan_in + fan_out)))


def _prefixed(prefix: str, params: list[Param]) -> list[Param]:
    return [replace(p, name=prefix + p.name) for p in params]
