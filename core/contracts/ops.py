"""The tensor operations that a backend owes the shared mathematics.

Shape letters: N images per batch, C channels, H height, W width, L patches, D feature width.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from triptych.core.contracts.step import Array, Tensor


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
