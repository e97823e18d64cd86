"""The pieces that the shared parts, a method and a backend hand each other.

mypy holds ``core`` and every backend to the protocols of this file (``make lint``).

Shape letters: N images per batch, C channels, H height, W width, L patches, D feature width.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from triptych.core.config.spec import RunSpec

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


class Ops(Protocol):
    """Fused tensor operations that the shared mathematics needs; a backend's ``ops`` module."""

    def l2_normalize(self, x: Tensor, /, *, eps: float = 1e-12) -> Tensor:
        """x / max(|x|, eps) over the last axis. x: (N, D)."""

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

    def soft_assign(self, x: Tensor, words: Tensor, sharpness: Tensor, /) -> tuple[Tensor, Tensor]:
        """Codes softmax(sharpness * cosine(x, word)) of tokens, and how much the cosines differ.

        No gradient. Norms are taken as 1e-5 at least.

        Args:
            x: (N, L, D).
            words: (K, D), unit rows.
            sharpness: (1,).

        Returns:
            (N, L, K) codes, and (N,): largest less mean cosine of each token, mean over L.
        """

    def mean_tokens(self, x: Tensor, index: Array, /) -> Tensor:
        """Mean over some tokens, the same of each image. x: (N, L, D); index: (M,). (N, D)."""

    def gather_tokens(self, x: Tensor, image: Array, token: Array, /) -> Tensor:
        """Chosen tokens: result[i] = x[image[i], token[i]].

        x: (N, L, D); image, token: (M,) int64. Returns (M, D).
        """

    def kl_divergence(self, target: Tensor, logits: Tensor, /) -> Tensor:
        """Mean over rows of sum_k t_k (ln t_k - ln softmax(z)_k), where 0 ln 0 = 0.

        Args:
            target: (N, K), no gradient; rows sum to 1.
            logits: (N, K).
        """

    def entropy(self, p: Tensor, /) -> Tensor:
        """Mean over rows of -sum_k p_k ln p_k, where 0 ln 0 = 0. p: (N, K). No gradient."""

    def concat(self, parts: Sequence[Tensor], /, *, axis: int) -> Tensor:
        """Tensors one behind the other along an axis."""

    def no_grad(self) -> AbstractContextManager[Any]:
        """No gradient is recorded inside."""


class Networks(Protocol):
    """The networks of a run as its engine sees them, whatever the method."""

    def features(
        self, branch: str, images: Tensor, layers: Sequence[int], /, *, projection: bool
    ) -> dict[str, Tensor]:
        """Tokens of an encoder in evaluation mode (running statistics). No gradient is needed.

        Args:
            branch: "student" or "teacher".
            images: (N, C, H, W).
            layers: as in ``core.engine.Engine.embed``.
            projection: whether the projector's output is wanted too.

        Returns:
            "final" and "layer<i>": (N, 1+L, D), class token first; "projection": (N, D).
        """

    def counters(self) -> dict[str, "Slot"]:
        """The numbers of the state that the host keeps, by canonical name."""


class Model(Networks, Protocol):
    """Student and teacher as a method's shared step sees them; a native module of the backend."""

    def query(self, view: Tensor, /) -> Tensor:
        """Student encoder, projector and predictor in training mode. (N, C, H, W) -> (N, D)."""

    def key(self, view: Tensor, /) -> Tensor:
        """Teacher encoder and projector in training mode. (N, C, H, W) -> (N, D)."""

    def update_teacher(self, momentum: float, /) -> None:
        """teacher <- momentum * teacher + (1 - momentum) * student, parameters only, in place."""


class Memory(Protocol):
    """Keys of earlier steps (MoCo v1 and v2); state under ``memory.``."""

    pointer: int
    """Column where the next keys go: on the host, see ``core.methods.ring``."""

    @property
    def queue(self) -> Tensor:
        """(C, K), unit columns."""

    def enqueue(self, keys: Tensor, /) -> None:
        """Overwrites the oldest columns, in place. keys: (N, C), unit rows."""


class QueueModel(Model, Protocol):
    """A model with a queue of keys."""

    @property
    def memory(self) -> Memory:
        """The queue."""


class Codebook(Protocol):
    """Visual words of MOCA, teacher tokens of earlier steps; state under ``memory.``."""

    pointer: int
    """Row where the next words go."""
    updates: int
    """Updates done."""

    @property
    def words(self) -> Tensor:
        """(K, D), unit rows."""

    @property
    def distance(self) -> Tensor:
        """(1,): running mean of how much a token's cosines with the words differ."""

    @property
    def distance_used(self) -> Tensor:
        """(1,): ``distance`` as it was at the last update, which sets the temperature."""

    def update(self, words: Tensor, differences: Sequence[Tensor], /) -> None:
        """Overwrites the oldest rows, and moves the running mean once for each view, in place.

        Args:
            words: (M, D), unit rows.
            differences: a scalar of each view.
        """


class MocaModel(Networks, Protocol):
    """MOCA's networks as its step sees them; a native module of the backend."""

    @property
    def memory(self) -> Codebook:
        """The visual words."""

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of an image's patches."""

    def update_teacher(self, momentum: float, /) -> None:
        """As in ``Model``."""

    def teacher_tokens(self, images: Tensor, /) -> Tensor:
        """All patches through the teacher and its last norm. (N, C, H, W) -> (N, L, D)."""

    def encode(self, images: Tensor, ids: Array, /) -> tuple[Tensor, Tensor]:
        """Only the patches ``ids``, (N, T) int64, through the student.

        Returns:
            Two of (N, 1+T, D), class token first: output of the early block, raw (behind the last
            norm where that is the last block); and of the last block, behind the last norm.
        """

    def decode(self, image: Tensor, early: Tensor, ids: Array, /) -> Tensor:
        """Features of the visible patches and of further ones.

        Args:
            image: (N, D), takes the place of the class token.
            early: (N, 1+T, D), of ``encode``.
            ids: (N, M) int64, the visible T first.

        Returns:
            (N * M, decoder width), image by image.
        """

    def image_weights(self, words: Tensor, /) -> Tensor:
        """Weights of the image predictor made from the words, times kappa. (K, D) -> (K, D)."""

    def dense_weights(self, words: Tensor, /) -> Tensor:
        """The same of the dense predictor. (K, D) -> (K, decoder width)."""


class Optimizer(Protocol):
    """Applies one update to the tensors that it was given; state is exported by name."""

    count: int
    """Updates done."""

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

    @classmethod
    def counter(cls, owner: object, attribute: str) -> "Slot":
        """A number that the host keeps, as an int64 scalar."""
        return cls(
            (),
            lambda: np.array(getattr(owner, attribute), np.int64),
            lambda array: setattr(owner, attribute, int(array)),
        )


ModelT = TypeVar("ModelT", contravariant=True)
SectionT = TypeVar("SectionT", contravariant=True)


class Method(Protocol[ModelT, SectionT]):
    """What a method does beyond its tensors; a module of ``core.methods``.

    Type parameters: the networks that its step needs, and its section of the spec.
    """

    FLAT: float
    """Spread below which a loss at chance is a collapse."""
    REMEDY: str
    """What helps against a collapse, besides a lower learning rate."""
    CHANCE: str
    """How the summary of a spec tells the chance level, which takes the place of "{:.4f}"."""

    def chance(self, spec: RunSpec, /) -> float:
        """The loss of features that tell no image from another; > 0."""

    def settled(self, spec: RunSpec, /) -> int:
        """Steps at the start whose loss tells nothing about the features."""

    def spread(self, values: Mapping[str, float], /) -> float:
        """How well images are told apart, from the metrics of a step."""

    def status(self, values: Mapping[str, float], /) -> list[str]:
        """What the method adds to the line of a logged step, from its metrics."""

    def draws(self, spec: RunSpec, step: int, /) -> dict[str, Array]:
        """The random numbers of a step beyond its views, by name."""

    def check_draws(self, spec: RunSpec, draws: Mapping[str, Array], /) -> None:
        """Raises ValueError for draws of the right names, shapes and types that no run could draw.

        For draws that come from elsewhere.
        """

    def forward(
        self,
        ops: Ops,
        model: ModelT,
        views: tuple[Tensor, ...],
        draws: Mapping[str, Array],
        hyper: Hyper,
        spec: SectionT,
        /,
    ) -> Outcome:
        """The forward pass of one step, the move of the teacher included.

        Args:
            views: two of (N, C, H, W).
        """

    def finish(self, model: ModelT, outcome: Outcome, /) -> None:
        """What is left to do after the update; no gradient is recorded."""
