"""The networks, memories and optimizers that a backend owes the methods and the engine.

Shape letters: N images per batch, C channels, H height, W width, L patches, D feature width.
"""

from collections.abc import Sequence
from typing import Protocol

from triptych.core.contracts.step import Array, Hyper, Slot, Tensor


class Encoder(Protocol):
    """An encoder; a native module of the backend, whose call gives (N, D)."""

    def tokens(self, images: Tensor, layers: Sequence[int] = (), /) -> dict[str, Tensor]:
        """The tokens of the last layer and of chosen ones.

        A ViT's last tokens are behind its last norm, those of a block are raw. A ResNet's tokens
        are the positions of its map, row by row, behind their mean.

        Args:
            images: (N, C, H, W).
            layers: 0-based indices of blocks, in a ResNet of stages.

        Returns:
            "final" and "layer<i>", each (N, 1+L, D).
        """


class MaskedEncoder(Encoder, Protocol):
    """An encoder that can leave patches out: a ViT."""

    def masked(self, images: Tensor, ids: Tensor, /, early: int) -> tuple[Tensor, Tensor]:
        """Some of the patches only: positions are added, then the others left out.

        Args:
            images: (N, C, H, W).
            ids: (N, T) int64, the patches that are seen, row-major.
            early: blocks before the last whose raw output is wanted; 0: the final tokens.

        Returns:
            That output and the tokens after the last norm, each (N, 1+T, D), class token first.
        """


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

    def counters(self) -> dict[str, Slot]:
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
