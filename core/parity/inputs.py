"""The images and draws of a trace, read from a file instead of made from the spec."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import numpy as np

from triptych.core import formats, methods
from triptych.core.config.spec import LinearSpec, RunSpec, SupervisedSpec
from triptych.core.contracts import Array, Batch, State
from triptych.core.errors import UserError
from triptych.core.parameters import probe_width

VIEWS = ("view1", "view2")
"""Names of the images of a method with two views."""
LABELLED = ("images", "labels")
"""Names of the images and their labels, of a method that learns from labels."""
KINDS = {"f": "real numbers", "i": "whole numbers"}
"""Text in messages for each kind of NumPy type. Unsigned integers count as "i"."""


def recorded(
    path: Path, spec: RunSpec, steps: int
) -> tuple[Iterator[Batch], Callable[[int], Mapping[str, Array]]]:
    """The batches of a trace, and a function that returns the draws of a step.

    The file holds ``view1`` and ``view2``, each (steps, N, C, H, W). For a method that learns from
    labels it holds ``images``, (steps, N, C, H, W) or cached features (steps, N, D), and
    ``labels``, (steps, N). It may also hold all draws of the method by name, each with the steps as
    first axis.

    Args:
        path: npz file.
        spec: of the run.
        steps: number of steps that the trace needs.

    Raises:
        UserError: the file is missing; an array is missing, superfluous, of another shape or type,
            or has fewer steps; or no run could draw these draws.
    """
    arrays = formats.read_arrays(path)
    method = methods.METHODS[spec.method.name]
    examples = _examples(spec)
    names = tuple(examples)
    if arrays.keys() - names:
        examples |= method.draws(spec, 0)
    _check_arrays(path, arrays, examples, steps)
    arrays = {name: _plain(array) for name, array in arrays.items()}
    _check_classes(path, arrays, spec)
    index = np.arange(spec.train.batch_size, dtype=np.int64)
    labels = arrays.pop("labels", None)
    views = zip(*(arrays.pop(name) for name in names if name != "labels"), strict=False)
    batches = (
        Batch(step_views, index, None if labels is None else labels[step])
        for step, step_views in enumerate(views)
    )
    if not arrays:
        return batches, partial(method.draws, spec)

    def draws(step: int) -> Mapping[str, Array]:
        return {name: array[step] for name, array in arrays.items()}

    for step in range(steps):
        try:
            method.check_draws(spec, draws(step))
        except ValueError as error:
            raise UserError(f"{path}: step {step}: {error}") from error
    return batches, draws


def takes_features(spec: RunSpec) -> bool:
    """Whether the method trains on features instead of images."""
    return isinstance(spec.method, LinearSpec) and spec.method.features == "cached"


def _examples(spec: RunSpec) -> State:
    """Arrays of the names, shapes and types of one step's images and labels."""
    count = spec.train.batch_size
    images = np.empty((count, spec.model.channels, *spec.model.size), np.float32)
    if not spec.method.labelled:
        return dict.fromkeys(VIEWS, images)
    if takes_features(spec):
        images = np.empty((count, probe_width(spec)), np.float32)
    return dict(zip(LABELLED, (images, np.empty(count, np.int64)), strict=True))


def _check_classes(path: Path, arrays: State, spec: RunSpec) -> None:
    if not isinstance(spec.method, SupervisedSpec):
        return
    labels, classes = arrays["labels"], spec.method.classes
    if not ((labels >= 0) & (labels < classes)).all():
        raise UserError(
            f"{path}: labels: {labels.min()} to {labels.max()}, expected 0 to {classes - 1} "
            f"(method.classes {classes})"
        )


def _plain(array: Array) -> Array:
    """The array in a type of every framework: some lack unsigned and extended-precision types."""
    if array.dtype.kind in "iu":
        return array.astype(np.int64, copy=False)
    return array.astype(np.float64) if array.dtype.itemsize > 8 else array


def _check_arrays(path: Path, arrays: State, examples: Mapping[str, Array], steps: int) -> None:
    """Checks names, shapes, types and lengths. ``examples`` are the expected arrays of one step."""
    for names, problem in (
        (examples.keys() - arrays.keys(), "missing"),
        (arrays.keys() - examples.keys(), "not among what the spec's method reads"),
    ):
        if names:
            listed = ", ".join(sorted(names))
            raise UserError(f"{path}: {listed}: {problem}; expected {', '.join(examples)}")
    for name, example in examples.items():
        array = arrays[name]
        if array.shape[1:] != example.shape or array.ndim != example.ndim + 1:
            raise UserError(
                f"{path}: {name}: shape {array.shape}, "
                f"expected (steps, *{example.shape}) by the spec"
            )
        if array.dtype.kind.replace("u", "i") != example.dtype.kind:
            raise UserError(f"{path}: {name}: {array.dtype}, expected {KINDS[example.dtype.kind]}")
        if len(array) < steps:
            raise UserError(f"{path}: {name} holds {len(array)} steps, --steps is {steps}")
