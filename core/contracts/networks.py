"""The networks, memories and optimizers that a backend provides to the methods and the engine.

Shape letters: N images per batch, C channels, H height, W width, L patches, D feature width.
"""

from collections.abc import Sequence
from typing import Protocol

from triptych.core.contracts.step import Hyper, Index, Slot, Tensor


class Encoder(Protocol):
    """An encoder: a native module of the backend. A call of it returns features (N, D)."""

    def tokens(self, images: Tensor, layers: Sequence[int] = (), /) -> dict[str, Tensor]:
        """The final tokens and those of the given layers.

        The final tokens of a ViT are the output of its last norm. The tokens of a block are the
        block's raw output. The tokens of a ResNet are the mean over its feature map, then the
        positions of the map, row by row.

        Args:
            images: (N, C, H, W).
            layers: indices, from 0, of blocks (ViT) or stages (ResNet).

        Returns:
            "final": (N, 1+L, D).
            "layer<i>": (N, 1+L, D).
        """

    def pooled(
        self, images: Tensor, pooling: str, scales: Sequence[tuple[Tensor, Tensor]] = (), /
    ) -> Tensor:
        """The feature of each image. (N, C, H, W) -> (N, D).

        Args:
            images: (N, C, H, W).
            pooling: "cls" or "mean" (of the patch tokens). A ResNet has the mean of its map.
            scales: of each block of a ViT, the factors (N, 1, 1) of its two residual branches;
                empty: all are 1.
        """


class MaskedEncoder(Encoder, Protocol):
    """An encoder that can omit patches: a ViT."""

    def masked(self, images: Tensor, ids: Tensor, /, early: int) -> tuple[Tensor, Tensor]:
        """The tokens of the visible patches. Positions are added before patches are omitted.

        Args:
            images: (N, C, H, W).
            ids: (N, T) int64, row-major indices of the visible patches of each image.
            early: distance of the early block from the last one, in blocks; 0: the final tokens.

        Returns:
            early: (N, 1+T, D), class token first: raw output of the early block.
            final: (N, 1+T, D), class token first: tokens after the last norm.
        """

    def class_attention(self, images: Tensor, /) -> Tensor:
        """The attention of the class token in the last block, after the softmax.

        Args:
            images: (N, C, H, W).

        Returns:
            (N, heads, 1+L): the class token itself, then the patches row by row. Rows sum to 1.
        """


class Networks(Protocol):
    """The networks of a run, as the engine uses them with every method."""

    def features(
        self,
        branch: str,
        images: Tensor,
        layers: Sequence[int],
        /,
        *,
        projection: bool,
        whole: bool,
    ) -> dict[str, Tensor]:
        """Tokens of an encoder in evaluation mode (running statistics). Gradients are not needed.

        Args:
            branch: "student" or "teacher".
            images: (N, C, H, W).
            layers: as in ``core.engine.Engine.embed``.
            projection: whether to return the projector's output too.
            whole: whether all final tokens are asked for, or the class token alone. ``layers`` need
                all.

        Returns:
            "final": (N, 1+L, D), class token first; or (N, 1, D).
            "layer<i>": (N, 1+L, D), class token first.
            "projection": (N, output width).
        """

    def attention(self, branch: str, images: Tensor, /) -> Tensor:
        """``MaskedEncoder.class_attention`` of an encoder in evaluation mode; for a ViT only."""

    def counters(self) -> dict[str, Slot]:
        """The counters of the state that live on the host, by canonical name."""

    def track(self, branch: str, flag: bool, /) -> None:
        """Sets whether batch norms in training update their running statistics.

        Of several micro-batches, only the first one moves the running statistics.

        Args:
            branch: "student" or "teacher".
            flag: whether they update them from now on.
        """


class Model(Networks, Protocol):
    """The networks of MoCo, as the method's step uses them. A native module of the backend."""

    def encoded(self, branch: str, view: Tensor, /) -> Tensor:
        """The encoder's feature in training mode. (N, C, H, W) -> (N, D).

        Args:
            branch: "student" or "teacher".
            view: (N, C, H, W).
        """

    def projected(self, branch: str, features: Tensor, /) -> Tensor:
        """The output of the projector, and of the predictor if there is one, in training mode.

        Args:
            branch: "student" or "teacher".
            features: (N, D), of ``encoded``.

        Returns:
            (N, output width).
        """

    def update_teacher(self, momentum: float, /) -> None:
        """Sets teacher to momentum * teacher + (1 - momentum) * student, in place.

        The running statistics of batch norms follow the key ``method.teacher_statistics``.
        """


class Memory(Protocol):
    """The queue of keys of MoCo v1 and v2. Its state has the prefix ``memory.``."""

    pointer: int
    """Column that the next keys overwrite first. An integer on the host (``core.methods.ring``)."""

    @property
    def queue(self) -> Tensor:
        """(C, K), unit columns."""

    def enqueue(self, keys: Tensor, /) -> None:
        """Overwrites the oldest columns in place.

        Args:
            keys: (N, C), unit rows.
        """


class QueueModel(Model, Protocol):
    """A model with a queue of keys."""

    @property
    def memory(self) -> Memory:
        """The queue."""


class Codebook(Protocol):
    """The visual words of MOCA, which are teacher tokens of earlier steps.

    The state has the prefix ``memory.``.
    """

    pointer: int
    """Row that the next words overwrite first."""
    updates: int
    """Number of updates done."""

    @property
    def words(self) -> Tensor:
        """(K, D), unit rows."""

    @property
    def distance(self) -> Tensor:
        """(1,), running mean of the tokens' largest minus mean cosine with the words."""

    @property
    def distance_used(self) -> Tensor:
        """(1,), value of ``distance`` after the last update. It sets the temperature."""

    def update(self, words: Tensor, differences: Sequence[Tensor], /) -> None:
        """Overwrites the oldest rows and updates the running mean once for each view, in place.

        Args:
            words: (M, D), unit rows.
            differences: one scalar for each view, the mean of ``Ops.soft_assign``'s differences.
        """


class MocaModel(Networks, Protocol):
    """The networks of MOCA, as the method's step uses them. A native module of the backend."""

    @property
    def memory(self) -> Codebook:
        """The visual words."""

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of an image's patches."""

    def update_teacher(self, momentum: float, /) -> None:
        """As in ``Model``."""

    def teacher_tokens(self, images: Tensor, /) -> Tensor:
        """The teacher's patch tokens after the last norm. (N, C, H, W) -> (N, L, D)."""

    def encode(self, images: Tensor, ids: Index, /) -> tuple[Tensor, Tensor]:
        """The student's tokens of the visible patches.

        Args:
            images: (N, C, H, W).
            ids: (N, T) int64, the visible patches of each image.

        Returns:
            early: (N, 1+T, D), class token first: output of the early block. The last norm
                applies only where the early block is the last one.
            last: (N, 1+T, D), class token first: output of the last block after the last norm.
        """

    def decode(self, image: Tensor, early: Tensor, ids: Index, /) -> Tensor:
        """The decoder's features of the visible patches and of masked ones.

        Args:
            image: (N, D), feature of each image. It takes the place of the class token.
            early: (N, 1+T, D), early tokens of ``encode``.
            ids: (N, M) int64, patches of each image, the visible T first.

        Returns:
            (N * M, decoder width), image by image.
        """

    def image_weights(self, words: Tensor, /) -> Tensor:
        """The image predictor's weights, made from the words, times kappa. (K, D) -> (K, D)."""

    def dense_weights(self, words: Tensor, /) -> Tensor:
        """The dense predictor's weights, likewise. (K, D) -> (K, decoder width)."""


class Classifier(Networks, Protocol):
    """The networks of linear probe and fine-tuning."""

    def classify(self, branch: str, images: Tensor, /) -> list[Tensor]:
        """The logits of each classifier, in evaluation mode.

        Args:
            branch: as in ``features``.
            images: (N, C, H, W), or cached features (N, D).

        Returns:
            One tensor (N, classes) for each classifier.
        """


class LinearModel(Classifier, Protocol):
    """A frozen encoder with linear classifiers. A native module of the backend."""

    def frozen(self, images: Tensor, /) -> Tensor:
        """The features that the classifiers get, in evaluation mode. (N, C, H, W) -> (N, D)."""

    def logits(self, features: Tensor, /) -> list[Tensor]:
        """The logits (N, classes) of each classifier. features: (N, D)."""


class FinetuneModel(Classifier, Protocol):
    """An encoder with a classifier, and their moving average if the spec has one."""

    def predict(self, images: Tensor, keep: Tensor | None, /) -> tuple[Tensor, Tensor]:
        """The feature (N, D) and the logits (N, classes) of images, in training mode.

        Args:
            images: (N, C, H, W).
            keep: (2 * depth, N), float: factors of the residual branches, those of a block's
                attention before those of its MLP; None: all are 1.
        """

    def update_teacher(self, momentum: float, /) -> None:
        """As in ``Model``."""


class Optimizer(Protocol):
    """Updates the parameters that it was built with."""

    count: int
    """Number of updates done."""

    def step(self, hyper: Hyper, /) -> None:
        """One update with this step's learning rate and weight decay."""
