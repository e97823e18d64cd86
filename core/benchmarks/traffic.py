"""Bytes that a process sends in one step: counted at its groups, and the least by a formula.

A ring of n processes is assumed, which sends the least (Patarasuk and Yuan, 2009). For S bytes on
each process:

- sum: 2 (n - 1) / n S.
- gather: (n - 1) S.
- broadcast: (n - 1) / n S, on average.
- send: S.

Letters: N images of the step, d copies of the model, t processes of a tensor group, s bytes of a
number, L tokens of an image, W width of the encoder.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any, cast

from triptych.core import parameters
from triptych.core.config.spec import MocaSpec, MocoV3Spec, QueueSpec, RunSpec, VitSpec
from triptych.core.contracts import Group, Ranks, Tensor
from triptych.core.parallel.sharding import splits
from triptych.core.parameters import Head

RING: dict[str, Callable[[int], float]] = {
    "sum": lambda n: 2 * (n - 1) / n,
    "sum_": lambda n: 2 * (n - 1) / n,
    "sum_gradients": lambda n: 2 * (n - 1) / n,
    "sum_gradients_to_owners": lambda n: (n - 1) / n,
    "gather": lambda n: n - 1,
    "broadcast": lambda n: (n - 1) / n,
    "send": lambda n: 1.0,
}
"""Method of a group -> what a process sends for each byte of the arguments, of n processes.

``core.contracts.Group`` has sum, gather and broadcast. Those of gradients are PyTorch's, and Paddle
sums in place.
"""
AXES = ("replicas", "norms", "tensor", "pipeline")


def count(ranks: Ranks) -> Counter[str]:
    """Counts from now on what this process sends to each group, in bytes by the group's name."""
    sent: Counter[str] = Counter()
    for axis in AXES:
        group = getattr(ranks, axis)
        for name in RING if group.count > 1 else ():
            if hasattr(group, name):
                setattr(group, name, _counted(getattr(group, name), sent, axis, group, name))
    return sent


def _counted(
    method: Callable[..., Any], sent: Counter[str], axis: str, group: Group, name: str
) -> Callable[..., Any]:
    """A method of a group that adds to ``sent`` what it sends."""

    @wraps(method)
    def counted(x: Any, *arguments: Any) -> Any:
        if name.startswith("sum_gradients"):
            x = [list(part) if name.endswith("owners") else part for part in x]
        sent[axis] += round(RING[name](group.count) * sum(map(_bytes, _flat(x))))
        return method(x, *arguments)

    return counted


def _flat(x: Any) -> Iterable[Tensor]:
    """The tensors of nested lists, or one tensor."""
    return [tensor for part in x for tensor in _flat(part)] if isinstance(x, list) else [x]


def _bytes(x: Tensor) -> int:
    """Size of a tensor of any framework: the name of its type ends with the bits of a number."""
    match = re.search(r"(\d+)\D*$", str(x.dtype))
    return math.prod(x.shape) * int(match[1]) // 8 if match else math.prod(x.shape)


def least(spec: RunSpec) -> dict[str, float]:
    """The bytes that the algorithm needs, by the name of the group.

    replicas: the gradients, 2 (d - 1) / d s for each trained number of a process (with a shared
        optimizer one half for the gradients, one for the weights); MoCo v3: the keys of both views;
        MoCo v1 and v2: images and keys of a view; MOCA: the new words.
    tensor, for MoCo v3: each block adds up N / d L W numbers twice forward and twice backward, and
        each pair of a head's layers its output and the gradient of its input. The last block has
        one token, but for the gradient of its keys and values.
    pipeline, for MoCo v3, of the first stage: N / d L W numbers of each view for the teacher and
        for each forward pass of the student. There are two of these with several micro-batches,
        since the heads need the features of all.

    The statistics of batch norms, losses and metrics, which are far less, are left out.
    """
    size = 8 if spec.precision == "float64" else 4
    copies, sharing = spec.parallel.data, spec.parallel.tensor
    numbers = {"replicas": 0.0}
    if copies > 1:
        trained = _trained(spec)
        numbers["replicas"] = 2 * (copies - 1) / copies * trained + (copies - 1) * _exchanged(spec)
    if sharing > 1 and isinstance(spec.method, MocoV3Spec):
        numbers["tensor"] = 2 * (sharing - 1) / sharing * _added_up(spec)
    if spec.parallel.pipeline > 1 and isinstance(spec.method, MocoV3Spec):
        model, parts = (
            cast(VitSpec, spec.model),
            spec.train.accumulate * spec.parallel.micro_batches,
        )
        tokens = (1 + math.prod(model.grid)) * spec.train.batch_size // copies
        numbers["pipeline"] = 2 * (3 if parts > 1 else 2) * tokens * model.width
    return {axis: size * value for axis, value in numbers.items() if value}


def _trained(spec: RunSpec) -> int:
    """Number of trained numbers of one process."""
    table = splits(spec)
    return sum(
        math.prod(param.shape) // (1 if table[param.name].axis is None else spec.parallel.tensor)
        for param in parameters.table(spec)
        if param.trainable
    )


def _exchanged(spec: RunSpec) -> int:
    """Numbers that each copy gives to the others, besides gradients."""
    method, images = spec.method, spec.train.batch_size // spec.parallel.data
    if isinstance(method, MocoV3Spec):
        return 2 * images * method.output_dim
    if isinstance(method, QueueSpec):
        return images * (spec.model.channels * math.prod(spec.model.size) + method.output_dim)
    if isinstance(method, MocaSpec):
        return method.step_words * cast(VitSpec, spec.model).width
    return 0


def _added_up(spec: RunSpec) -> int:
    """Numbers that the processes of a tensor group add up in a step of MoCo v3."""
    model, parts = cast(VitSpec, spec.model), parameters.parts(spec)
    images = spec.train.batch_size // spec.parallel.data
    tokens = 1 + math.prod(model.grid)
    forward = 2 * ((model.depth - 1) * tokens + 1) * model.width
    backward = forward + (tokens - 1) * model.width
    (out, of_input), (predicted, of_projection) = map(_pairs, (parts.projector, parts.predictor))
    student = forward + backward + out + of_input + predicted + of_projection
    return 2 * images * (student + forward + out)


def _pairs(head: Head) -> tuple[int, int]:
    """Widths of the outputs and of the inputs of the pairs of a head's linear layers."""
    linear = [layer for layer in head.layers if layer.kind in ("linear", "biased")]
    pairs = list(zip(linear[::2], linear[1::2], strict=False))
    return sum(last.fan_out for _, last in pairs), sum(first.fan_in for first, _ in pairs)
