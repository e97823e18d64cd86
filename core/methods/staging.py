"""A batch on its way to the device: its micro-batches, with all that a step needs of the host.

Everything travels together before the computation starts. A copy in the middle of a step would make
the device wait for the host.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from triptych.core.contracts import Array, Batch, Changes, Courier, Method, Ops, Step, Tensor
from triptych.core.methods.colours import changed


def divided(batch: Batch, count: int) -> list[Batch]:
    """The micro-batches of a batch, in order; at most ``count``."""
    size = -(-len(batch.index) // count)
    return [batch.part(slice(i, i + size)) for i in range(0, len(batch.index), size)]


def placed(
    method: Method[Any, Any], step: Step[Any, Any], batch: Batch, parts: Sequence[Batch]
) -> tuple[Batch, list[Batch]]:
    """Adds the places to a batch and to its micro-batches. All hold arrays."""
    several = len(parts) > 1

    def with_places(part: Batch) -> Batch:
        places = method.places(step, part, batch)
        if len(part.index) != part.whole_size:
            places["share"] = np.array(len(part.index) / part.whole_size)
        return replace(part, places=places)

    found = [with_places(part) for part in parts]
    return with_places(batch) if several else replace(batch, places=found[0].places), found


def on_device(
    ops: Ops,
    batch: Batch,
    parts: Sequence[Batch],
    tensor: Callable[[Array], Tensor],
    courier: Courier | None,
) -> tuple[Batch, list[Batch]]:
    """A batch with places as tensors, and its micro-batches with tensors, as networks take them.

    Args:
        batch: with arrays, of ``placed``, like the micro-batches.
        tensor: makes a tensor of an array, where there is no courier.
    """
    places_alone = replace(batch, views=(), targets=None, levels=None, changes=())
    several = [places_alone] if len(parts) > 1 else []
    everything = [*parts, *several]
    found = carried(everything, courier) if courier else on_host(everything, tensor)
    whole = replace(batch, places=found[-1].places)
    return whole, [normalized(ops, part) for part in found[: len(parts)]]


def on_host(parts: Sequence[Batch], tensor: Callable[[Array], Tensor]) -> list[Batch]:
    """Micro-batches for a device that shares the memory of the host. Indices remain arrays."""

    def convert(array: Array) -> Tensor:
        return tensor(array) if np.issubdtype(array.dtype, np.floating) else array

    return [
        replace(
            part,
            views=tuple(map(tensor, part.views)),
            targets=None if part.targets is None else tensor(part.targets),
            levels=None if part.levels is None else tensor(part.levels),
            changes=tuple(
                tuple(each._replace(values=tensor(each.values)) for each in view)
                for view in part.changes
            ),
            places={name: convert(array) for name, array in part.places.items()},
        )
        for part in parts
    ]


def carried(parts: Sequence[Batch], courier: Courier) -> list[Batch]:
    """Micro-batches for a device with memory of its own."""
    tensors = iter(courier.carry([array for part in parts for array in _arrays(part)]))
    return [_with_tensors(part, tensors) for part in parts]


def _arrays(part: Batch) -> Iterator[Array]:
    yield from part.views
    yield from (array for array in (part.targets, part.levels) if array is not None)
    for view in part.changes:
        for each in view:
            yield from (each.rows, each.values)
    yield from part.places.values()


def _with_tensors(part: Batch, tensors: Iterator[Tensor]) -> Batch:
    """The micro-batch with tensors in the place of its arrays, in the order of ``_arrays``."""
    return replace(
        part,
        views=tuple(next(tensors) for _ in part.views),
        targets=None if part.targets is None else next(tensors),
        levels=None if part.levels is None else next(tensors),
        changes=tuple(
            tuple(Changes(each.operation, next(tensors), next(tensors)) for each in view)
            for view in part.changes
        ),
        places={name: next(tensors) for name in part.places},
    )


def normalized(ops: Ops, part: Batch) -> Batch:
    """The micro-batch with normalised views, after the changes that are left to the device."""
    if part.levels is None:
        return part
    views = part.views
    if part.changes:
        views = tuple(map(partial(changed, ops), views, part.changes))
    views = tuple(ops.normalized(view, part.levels) for view in views)
    return replace(part, views=views, levels=None, changes=())
