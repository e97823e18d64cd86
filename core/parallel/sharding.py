"""Which tensors tensor parallelism divides, and along which axis.

A linear layer is divided by its rows of outputs ("column" parallel, as the weight multiplies from
the right) or by its inputs ("row" parallel). A layer of the first kind and one of the second follow
each other: the first needs no exchange, the second adds up the partial sums of all processes and
then its bias (arXiv 1909.08053, section 3). So what enters a layer of the first kind has the
gradients of all processes added up. What no rule names is whole on each process.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from triptych.core import parameters
from triptych.core.config.spec import RunSpec
from triptych.core.contracts import Array, State
from triptych.core.parameters import Head


@dataclass(frozen=True)
class Split:
    """How a tensor is divided.

    Attributes:
        axis: axis of the canonical array that is divided; None: each process has the whole tensor.
        groups: number of equal contiguous parts along the axis, each of which is divided by itself.
    """

    axis: int | None = None
    groups: int = 1

    def part(self, array: Array, rank: int, count: int) -> Array:
        """The part of one of ``count`` processes.

        Raises:
            ValueError: the axis does not divide into ``count`` equal parts.
        """
        if self.axis is None:
            return array
        groups = np.split(array, self.groups, self.axis)
        return np.concatenate(
            [np.split(group, count, self.axis)[rank] for group in groups], self.axis
        )

    def joined(self, parts: Sequence[Array]) -> Array:
        """The whole array, from the parts of all processes in order."""
        if self.axis is None:
            return parts[0]
        pieces = zip(*(np.split(part, self.groups, self.axis) for part in parts), strict=True)
        return np.concatenate([piece for group in pieces for piece in group], self.axis)


Table = Mapping[str, Split]
"""The split of each tensor, by canonical name."""

WHOLE, OUTPUTS, INPUTS = Split(), Split(0), Split(1)
HEADS = Split(0, groups=3)
"""Query, key and value are contiguous thirds, and each third has contiguous heads."""

RULES: tuple[tuple[str, Split], ...] = (
    (r"(encoder|decoder)\.blocks\.\d+\.attn\.qkv\.(weight|bias)", HEADS),
    (r"(encoder|decoder)\.blocks\.\d+\.attn\.proj\.weight", INPUTS),
    (r"(encoder|decoder)\.blocks\.\d+\.mlp\.fc1\.(weight|bias)", OUTPUTS),
    (r"(encoder|decoder)\.blocks\.\d+\.mlp\.fc2\.weight", INPUTS),
    (r"(image|dense)_predictor\.hidden\.weight", OUTPUTS),
    (r"(image|dense)_predictor\.norm\.(weight|bias|running_mean|running_var)", OUTPUTS),
    (r"(image|dense)_predictor\.last\.weight", INPUTS),
    # Its inputs are as wide as the encoder, so they divide where the heads do. Classes may not.
    (r"classifier(\.\d+)?\.weight", INPUTS),
)
"""Name of a tensor within student or teacher -> its split, for ViTs and what follows them."""


def splits(spec: RunSpec) -> dict[str, Split]:
    """The split of each tensor of ``core.parameters.table(spec)``, by canonical name."""
    heads = parameters.parts(spec)
    named = {
        **_head_splits("projector", heads.projector),
        **_head_splits("predictor", heads.predictor),
    }
    return {param.name: _split(param.name, named) for param in parameters.table(spec)}


def _split(name: str, named: Mapping[str, Split]) -> Split:
    branch, _, tensor = name.partition(".")
    if branch == "memory":
        return WHOLE
    if tensor in named:
        return named[tensor]
    return next((split for rule, split in RULES if re.fullmatch(rule, tensor)), WHOLE)


def _head_splits(name: str, head: Head) -> dict[str, Split]:
    """The splits of a head: pairs of linear layers, by outputs and by inputs.

    What stands between the two layers of a pair is divided as the outputs of the first one are. A
    last layer without a partner is whole.
    """
    linear = [i for i, layer in enumerate(head.layers) if layer.kind in ("linear", "biased")]
    found: dict[str, Split] = {}
    for first, second in zip(linear[::2], linear[1::2], strict=False):
        for i in range(first, second):
            for tensor in ("weight", "bias", "running_mean", "running_var"):
                found[f"{name}.{i}.{tensor}"] = OUTPUTS
        found[f"{name}.{second}.weight"] = INPUTS
    return found


def part_of_state(
    state: Mapping[str, Array], table: Mapping[str, Split], rank: int, count: int
) -> State:
    """The part of a state, optimizer included, that one of ``count`` processes has."""
    return {n: split_of(n, table).part(array, rank, count) for n, array in state.items()}


def joined_state(parts: Sequence[Mapping[str, Array]], table: Mapping[str, Split]) -> State:
    """The whole state, from the parts of all processes in order."""
    return {n: split_of(n, table).joined([part[n] for part in parts]) for n in parts[0]}


def split_of(name: str, table: Mapping[str, Split]) -> Split:
    """The split of a tensor of the state. A moment is divided as its parameter is."""
    if name.startswith("optimizer."):
        # The name of a moment is "optimizer.<kind>.<name of the parameter>".
        name = name.split(".", 2)[-1]
    return table.get(name, WHOLE)
