"""The nearest neighbours of features by cosine similarity, exact in float64.

Products of blocks in float32, the backend's own, find the candidates, and only the candidates are
compared in float64. The result is the same as if all pairs were. Memory beside the features grows
with the number of queries only, and each row of the bank is normalised once.

Why no neighbour is missed: the float32 product of two unit rows differs from the true one by at
most ``_bound(D)``, in whatever order it is summed (Higham, Accuracy and Stability of Numerical
Algorithms, section 3.1). So the float32 similarity of a true neighbour lies at most twice the bound
below the k-th largest float32 similarity.

Shape letters:
    B: labelled images (the bank).
    Q: queries.
    D: feature width.
    K: neighbours.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from triptych.core.contracts import Array
from triptych.core.evaluation.subject import Check, Product, never, on_host

QUERIES, BANK = 256, 8192
"""Rows and columns of one block of similarities."""
GROUPS = 512
"""Groups of columns whose maxima bound the k-th largest similarity; at least ``SPREAD`` k."""
SPREAD = 4
DECIMALS = 12
"""Decimal places that similarities are rounded to.

The last bits of a product depend on the shape of the block. They must not decide between equally
near neighbours.
"""
RESCORED = 1 << 20
"""Numbers in one block of candidates' features, 8 MiB."""
FLOAT32 = 2.0**-24
"""Unit roundoff of float32."""


def neighbours(
    bank: Array, queries: Array, k: int, check: Check = never, product: Product = on_host
) -> tuple[Array, Array]:
    """The k nearest rows of the bank for each query, the nearest first.

    Among equally near rows the first ones of the bank are taken.

    Args:
        bank: (B, D); the rows may have any length.
        queries: (Q, D).
        k: 1 to B.
        check: called before each block, see ``Subject``.
        product: of blocks of both, see ``Subject``.

    Returns:
        Cosine similarities (Q, K) float64, rounded to ``DECIMALS``, and indices (Q, K) int64.

    Raises:
        ValueError: k is not in 1 to B, or features are not finite.
    """
    if not 1 <= k <= len(bank):
        raise ValueError(f"k: expected 1 to {len(bank)} (the bank), got {k}")
    width = max(GROUPS, 1 << (SPREAD * k - 1).bit_length())
    if len(bank) < BANK or width > BANK or _bound(bank.shape[1]) > 0.01:
        return _compare_all(bank, queries, k, check)
    unit = unit_rows(queries)
    similarity, index = np.empty((len(queries), k)), np.empty((len(queries), k), np.int64)
    crowded = np.zeros(len(queries), bool)
    norms = np.empty(len(bank))
    for rows, found in _candidates(bank, unit, k, width, norms, check, product):
        crowded[rows] = found.crowded
        columns = found.table()
        exact = _similarities(bank, norms, unit[rows], columns)
        best = largest(exact, k)
        similarity[rows] = np.take_along_axis(exact, best, axis=1)
        index[rows] = np.take_along_axis(columns, best, axis=1)
    if crowded.any():
        # So many rows are equally near in float32 that a list of candidates saves nothing.
        rest = _compare_all(bank, queries[crowded], k, check)
        similarity[crowded], index[crowded] = rest
    return similarity, index


def unit_rows(rows: Array) -> Array:
    """The rows at unit length in float64; a row of zeros stays zero.

    Raises:
        ValueError: a value is not finite.
    """
    rows = rows.astype(np.float64)
    unit: Array = rows / _norms(rows)
    return unit


def _norms(rows: Array) -> Array:
    """Lengths of float64 rows (N, 1), at least 1e-12."""
    if not np.isfinite(rows).all():
        raise ValueError("features are not finite")
    norms: Array = np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    return norms


def _blocks(length: int, size: int) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, length, size))


# ----------------------------------------------------------------------- candidates in float32


def _bound(width: int) -> float:
    """Largest error of a float32 product of unit rows of D numbers, with the rounding of both."""
    return 1.01 * (width + 8) * FLOAT32


@dataclass
class _Found:
    """Candidates of one block of queries.

    Attributes:
        maxima: (Q, G) float32, the largest similarity of each group of columns so far. The k-th
            largest of them is at most the k-th largest similarity.
        row: (M,) int64, query of each candidate.
        column: (M,) int64, row of the bank, ascending for each query.
        value: (M,) float32, similarity.
        crowded: (Q,) bool, queries with more candidates than ``limit``; theirs are dropped.
    """

    k: int
    margin: float
    maxima: Array
    crowded: Array
    row: Array = field(default_factory=lambda: np.empty(0, np.int64))
    column: Array = field(default_factory=lambda: np.empty(0, np.int64))
    value: Array = field(default_factory=lambda: np.empty(0, np.float32))

    @property
    def limit(self) -> int:
        return SPREAD * self.k + 256

    def add(self, similarity: Array, start: int) -> None:
        """Takes the candidates of a block (Q, n) whose first column is row ``start`` of B."""
        groups = self.maxima.shape[1]
        whole = similarity.shape[1] // groups * groups
        if whole:
            folded = similarity[:, :whole].reshape(len(similarity), -1, groups).max(axis=1)
            np.maximum(self.maxima, folded, out=self.maxima)
        lowest = np.partition(self.maxima, groups - self.k, axis=1)[:, groups - self.k]
        lowest -= np.float32(self.margin)
        lowest[self.crowded] = np.inf
        row, column = np.divmod(np.flatnonzero(similarity >= lowest[:, None]), similarity.shape[1])
        kept = self.value >= lowest[self.row]
        self.value = np.concatenate([self.value[kept], similarity[row, column]])
        self.row = np.concatenate([self.row[kept], row])
        self.column = np.concatenate([self.column[kept], start + column])
        self.crowded |= np.bincount(self.row, minlength=len(similarity)) > self.limit

    def table(self) -> Array:
        """The candidates' columns (Q, W) int64, ascending, then -1; none of a crowded query."""
        order = np.argsort(self.row, kind="stable")
        row, column = self.row[order], self.column[order]
        kept = ~self.crowded[row]
        row, column = row[kept], column[kept]
        counts = np.bincount(row, minlength=len(self.maxima))
        table = np.full((len(counts), max(counts.max(), self.k)), -1)
        starts = np.cumsum(counts) - counts
        table[row, np.arange(len(row)) - starts[row]] = column
        return table


def _candidates(
    bank: Array,
    unit: Array,
    k: int,
    groups: int,
    norms: Array,
    check: Check,
    product: Product,
) -> Iterator[tuple[slice, _Found]]:
    """(rows of Q, their candidates) for each block of queries; writes the bank's lengths (B,)."""
    queries = unit.astype(np.float32)
    margin = 2 * _bound(bank.shape[1])
    blocks = list(_blocks(len(queries), QUERIES))
    found = []
    for rows in blocks:
        count = len(queries[rows])
        maxima = np.full((count, groups), -np.inf, np.float32)
        found.append(_Found(k, margin, maxima, np.zeros(count, bool)))
    for columns in _blocks(len(bank), BANK):
        block = bank[columns].astype(np.float64)
        length = _norms(block)
        norms[columns] = length[:, 0]
        block = (block / length).astype(np.float32)
        for rows, candidates in zip(blocks, found, strict=True):
            check()
            candidates.add(product(queries[rows], block), columns.start)
    return zip(blocks, found, strict=True)


def _similarities(bank: Array, norms: Array, unit: Array, columns: Array) -> Array:
    """Rounded float64 similarities of queries (Q, D) to their candidates (Q, W); -inf for none."""
    similarity = np.empty(columns.shape)
    for rows in _blocks(len(unit), max(1, RESCORED // (columns.shape[1] * unit.shape[1]))):
        chosen = columns[rows]
        features = bank[chosen].astype(np.float64, copy=False)
        products = np.matmul(features, unit[rows][:, :, None])[:, :, 0]
        similarity[rows] = np.round(products / norms[chosen], DECIMALS)
    similarity[columns < 0] = -np.inf
    return similarity


# -------------------------------------------------------------------------- all pairs in float64


def _compare_all(bank: Array, queries: Array, k: int, check: Check) -> tuple[Array, Array]:
    """As ``neighbours``, with every pair in float64."""
    unit = unit_rows(queries)
    best = np.full((len(unit), k), -np.inf)
    index = np.full((len(unit), k), -1)
    for columns in _blocks(len(bank), BANK):
        block = unit_rows(bank[columns])
        position = np.arange(columns.start, columns.start + len(block))
        for rows in _blocks(len(unit), QUERIES):
            check()
            similarity = np.round(unit[rows] @ block.T, DECIMALS)
            similarity = np.hstack([best[rows], similarity])
            places = np.hstack(
                [index[rows], np.broadcast_to(position, (len(best[rows]), len(block)))]
            )
            column = largest(similarity, k)
            best[rows] = np.take_along_axis(similarity, column, axis=1)
            index[rows] = np.take_along_axis(places, column, axis=1)
    return best, index


def largest(values: Array, k: int) -> Array:
    """Columns of the k largest values in each row, descending; equal values from left to right."""
    if values.shape[1] > k:
        kth = -np.partition(-values, k - 1, axis=1)[:, k - 1 : k]
        above, equal = values > kth, values == kth
        room = k - above.sum(axis=1, keepdims=True)
        largest = above | (equal & (np.cumsum(equal, axis=1) <= room))
        columns = np.nonzero(largest)[1].reshape(len(values), k)
    else:
        columns = np.broadcast_to(np.arange(values.shape[1]), values.shape)
    order = np.argsort(-np.take_along_axis(values, columns, axis=1), axis=1, kind="stable")
    return np.take_along_axis(columns, order, axis=1)
