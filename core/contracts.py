"""The pieces that the shared parts and a backend hand each other.

Shape letters: N images per batch, C channels, H height, W width, D feature width.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeAlias

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


@dataclass(frozen=True)
class Context:
    """Where a process stands. device: "cpu" or "cuda:N"; precision as in the spec."""

    rank: int
    world: int
    device: str
    precision: str

    @property
    def is_main(self) -> bool:
        """Whether this process writes files."""
        return self.rank == 0


class Ops(Protocol):
    """Fused tensor operations that the shared mathematics needs; a backend's ``ops`` module."""

    def l2_normalize(self, x: Tensor, /) -> Tensor:
        """x / max(|x|, 1e-12) over the last axis. x: (N, D)."""

    def matmul(self, a: Tensor, b: Tensor, /, *, transpose_b: bool = False) -> Tensor:
        """a: (N, D); b: (D, M), or (M, D) with ``transpose_b``. Returns (N, M)."""

    def cross_entropy(self, logits: Tensor, labels: Tensor, /) -> Tensor:
        """Mean over rows of -log softmax(logits)[label]. logits: (N, M); labels: (N,) int64."""

    def labels(self, values: Array, like: Tensor, /) -> Tensor:
        """values: (N,) int64, each 0 <= value < M, as a tensor beside ``like``."""

    def accuracy(
        self, logits: Tensor, labels: Tensor, /, *, top: Sequence[int]
    ) -> tuple[Tensor, ...]:
        """Percent of rows whose label has one of the k largest logits, for each k of ``top``.

        Equal logits count against the label: features that tell nothing apart score 0. No
        gradient. logits: (N, M); labels: (N,) int64.
        """

    def row_dot(self, a: Tensor, b: Tensor, /) -> Tensor:
        """Inner product of each row of ``a`` with the same row of ``b``. (N, D) -> (N, 1)."""

    def gather_rows(self, x: Tensor, index: Array, /) -> Tensor:
        """Rows in another order: result[i] = x[index[i]]. x: (N, ...); index: (M,) int64."""

    def concat(self, parts: Sequence[Tensor], /, *, axis: int) -> Tensor:
        """Tensors one behind the other along an axis."""

    def no_grad(self) -> AbstractContextManager[Any]:
        """No gradient is recorded inside."""


class Model(Protocol):
    """Student and teacher as a method's shared step sees them; a native module of the backend."""

    def query(self, view: Tensor, /) -> Tensor:
        """Student encoder, projector and predictor in training mode. (N, C, H, W) -> (N, D)."""

    def key(self, view: Tensor, /) -> Tensor:
        """Teacher encoder and projector in training mode. (N, C, H, W) -> (N, D)."""

    def update_teacher(self, momentum: float, /) -> None:
        """teacher <- momentum * teacher + (1 - momentum) * student, parameters only, in place."""


class Memory(Protocol):
    """Keys of earlier steps (MoCo v1 and v2); state under ``memory.``."""

    queue: Tensor
    """(C, K), unit columns."""
    pointer: int
    """Column where the next keys go: on the host, see ``core.memory``."""

    def enqueue(self, keys: Tensor, /) -> None:
        """Overwrites the oldest columns, in place. keys: (N, C), unit rows."""


class QueueModel(Model, Protocol):
    """A model with a queue of keys."""

    memory: Memory


class Optimizer(Protocol):
    """Applies one update to the tensors that it was given; state is exported by name."""

    def step(self, hyper: Hyper, /) -> None:
        """One update with this step's learning rate and weight decay."""


class Slot(NamedTuple):
    """One native tensor of the state and how it becomes its canonical array."""

    shape: tuple[int, ...]
    """Canonical shape."""
    read: Callable[[], Array]
    """The canonical array: a copy, never an alias of the live tensor."""
    write: Callable[[Array], None]
    """Sets the live tensor from a canonical array of the same shape."""
