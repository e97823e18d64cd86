"""What goes into a step and comes out of one, and where it is computed.

Shape letters: N images per batch, C channels, H height, W width, L patches, D feature width.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

Tensor: TypeAlias = Any
"""A framework's own tensor."""
Array = NDArray[Any]
State = dict[str, Array]
"""Canonical name -> array in the canonical (PyTorch) layout."""


@dataclass(frozen=True)
class Batch:
    """The images of one step. views: two of (N, C, H, W) float32, normalised; index: (N,) int64."""

    views: tuple[Array, ...]
    index: Array


@dataclass(frozen=True)
class Hyper:
    """Scalars of one step. step: 0-based; lr: peak and schedule applied; ema: teacher momentum."""

    step: int
    lr: float
    weight_decay: float
    ema: float


@dataclass
class Outcome:
    """What a method's forward pass gives: the loss, scalars to log, features by name."""

    loss: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)
    features: dict[str, Tensor] = field(default_factory=dict)
    kept: dict[str, Tensor] = field(default_factory=dict)
    """What ``finish`` needs besides; no gradient."""


@dataclass(frozen=True)
class Context:
    """Where an engine computes.

    Attributes:
        device: "cpu" or "cuda:N".
        precision: as in the spec.
        runs_ahead: the host starts a step before the step before it is done, so it learns of a
            loss one step late. True on an accelerator, and wherever several processes train
            together: one that left a step by itself would leave the others waiting in it.
    """

    device: str
    precision: str
    runs_ahead: bool


class Ranks:
    """The processes that train one spec together, seen from one of them. This class is one alone.

    Attributes:
        rank: number of this process, from 0.
        world: number of processes.
    """

    rank: int = 0
    world: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and speaks to the terminal."""
        return self.rank == 0

    def largest(self, value: int) -> int:
        """The largest of the values that the ranks give, each >= 0; waits for all ranks."""
        return value

    def any(self, flag: bool) -> bool:
        """Whether the flag of at least one rank is set; waits for all ranks."""
        return self.largest(int(flag)) > 0


ALONE = Ranks()
"""One process, which waits for no other."""


class Slot(NamedTuple):
    """One native tensor of the state and how it becomes its canonical array."""

    shape: tuple[int, ...]
    """Canonical shape."""
    read: Callable[[], Array]
    """The canonical array: a copy, never an alias of the live tensor."""
    write: Callable[[Array], None]
    """Sets the live tensor from a canonical array of the same shape."""

    @classmethod
    def counter(cls, owner: object, attribute: str) -> "Slot":
        """A number that the host keeps, as an int64 scalar."""
        return cls(
            (),
            lambda: np.array(getattr(owner, attribute), np.int64),
            lambda array: setattr(owner, attribute, int(array)),
        )
