"""The tensor operations that a backend provides to the shared mathematics.

Shape letters: N images per batch, C channels, H height, W width, L patches, D feature width.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, Protocol, TypeAlias

from triptych.core.contracts.step import Index, Tensor

Kind: TypeAlias = Literal["uint8", "int32", "int64", "float32"]
"""A type of numbers that every framework has."""


class Ops(Protocol):
    """The tensor operations that the shared mathematics needs. A backend's ``ops`` module.

    An index is an array of int64 on the host, or a tensor of the device. An array is checked where
    the framework's kernel would not, and copied to the device.
    """

    def normalized(self, pixels: Tensor, levels: Tensor, /) -> Tensor:
        """(x / 255 - mean) / deviation in float32, each step rounded, like ``core.data.pixels``.

        Args:
            pixels: x, (N, C, H, W) uint8.
            levels: (3, C, 1, 1), floating: 255, then mean and deviation of each channel.

        Returns:
            (N, C, H, W), of the type of ``levels``.
        """

    def cast(self, x: Tensor, kind: Kind, /) -> Tensor:
        """The numbers in another type; fractions are cut off."""

    def where(self, condition: Tensor, a: Tensor, b: Tensor, /) -> Tensor:
        """The elements of ``a`` where the condition holds, else those of ``b``. Equal shapes."""

    def replace_rows(self, x: Tensor, index: Index, rows: Tensor, /) -> Tensor:
        """A copy of ``x`` with other rows.

        Args:
            x: (N, ...) int32.
            index: (n,) int64, without repetition.
            rows: (n, ...) int32, the new rows.
        """

    def l2_normalize(self, x: Tensor, /, *, eps: float = 1e-12) -> Tensor:
        """Returns x / max(|x|, eps), where |x| is the norm over the last axis. x: (N, D)."""

    def matmul(self, a: Tensor, b: Tensor, /, *, transpose_b: bool = False) -> Tensor:
        """The matrix product.

        Args:
            a: (N, D).
            b: (D, M), or (M, D) with ``transpose_b``.

        Returns:
            (N, M).
        """

    def cross_entropy(self, logits: Tensor, labels: Tensor, /) -> Tensor:
        """Mean over rows of -log softmax(logits)[label].

        Args:
            logits: (N, M).
            labels: (N,) int64.
        """

    def labels(self, values: Index, like: Tensor, /) -> Tensor:
        """Labels as a tensor on the device of ``like``.

        Args:
            values: (N,) int64, each 0 <= value < M.
            like: any tensor on the wanted device.
        """

    def accuracy(
        self, logits: Tensor, labels: Tensor, /, *, top: Sequence[int]
    ) -> tuple[Tensor, ...]:
        """Percentage of rows whose label has one of the k largest logits, for each k of ``top``.

        A logit that equals the label's counts as larger, so constant features score 0. The result
        carries no gradient.

        Args:
            logits: (N, M).
            labels: (N,) int64.
            top: the values of k.

        Returns:
            One scalar for each k, 0 to 100.
        """

    def row_dot(self, a: Tensor, b: Tensor, /) -> Tensor:
        """Inner product of each row of ``a`` with the same row of ``b``. (N, D) -> (N, 1)."""

    def gather_rows(self, x: Tensor, index: Index, /) -> Tensor:
        """Selects rows: result[i] = x[index[i]].

        Args:
            x: (N, ...).
            index: (M,) int64.

        Returns:
            (M, ...).
        """

    def soft_assign(self, x: Tensor, words: Tensor, sharpness: Tensor, /) -> tuple[Tensor, Tensor]:
        """The soft assignment of tokens to visual words, softmax(sharpness * cosine(x, word)).

        A norm below 1e-5 counts as 1e-5. The results carry no gradient.

        Args:
            x: (N, L, D), tokens.
            words: (K, D), unit rows.
            sharpness: (1,), inverse temperature.

        Returns:
            codes: (N, L, K), rows sum to 1.
            differences: (N,), largest minus mean cosine of each token, averaged over L.
        """

    def mean_tokens(self, x: Tensor, index: Index, /) -> Tensor:
        """Mean over selected tokens, the same positions in each image.

        Args:
            x: (N, L, D).
            index: (M,) int64, positions.

        Returns:
            (N, D).
        """

    def gather_tokens(self, x: Tensor, index: Index, /) -> Tensor:
        """Selects tokens: result[i] = x[index[i] // L, index[i] % L].

        Args:
            x: (N, L, D).
            index: (M,) int64.

        Returns:
            (M, D).
        """

    def kl_divergence(self, target: Tensor, logits: Tensor, /) -> Tensor:
        """Mean over rows of sum_k t_k (ln t_k - ln softmax(z)_k), where 0 ln 0 = 0.

        Args:
            target: t, (N, K), rows sum to 1; it gets no gradient.
            logits: z, (N, K).
        """

    def entropy(self, p: Tensor, /) -> Tensor:
        """Mean over rows of -sum_k p_k ln p_k (nats), where 0 ln 0 = 0. It carries no gradient.

        Args:
            p: (N, K), rows sum to 1.
        """

    def concat(self, parts: Sequence[Tensor], /, *, axis: int) -> Tensor:
        """Concatenates tensors along an axis."""

    def no_grad(self) -> AbstractContextManager[Any]:
        """A context in which the framework records no gradient."""
