"""Contrastive losses over ``ops``. Gathered keys and labels are arguments: no rank is known here.

Shape letters: N queries, M keys, D feature width.
"""

import numpy as np

from triptych.core.contracts import Array, Ops, Tensor


def info_nce(ops: Ops, query: Tensor, keys: Tensor, labels: Array, *, temperature: float) -> Tensor:
    """2 T times the cross-entropy of the cosine similarities over T (MoCo v3, equation 1).

    Args:
        query: (N, D), unit rows.
        keys: (M, D), unit rows, no gradient; gathered over replicas.
        labels: (N,) int64, the row of each query's positive key.
        temperature: dimensionless.
    """
    # Dividing the queries touches N*D numbers; dividing the logits would touch N*M.
    logits = ops.matmul(query / temperature, keys, transpose_b=True)
    loss = ops.cross_entropy(logits, ops.labels(labels, logits))
    return 2.0 * temperature * loss


def symmetric_info_nce(
    ops: Ops, query1: Tensor, query2: Tensor, key1: Tensor, key2: Tensor, *, temperature: float
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Each view's queries against the other view's keys (MoCo v3, algorithm 1).

    Args:
        query1, query2: (N, D), predictor outputs, not normalised.
        key1, key2: (N, D), teacher outputs, not normalised.

    Returns:
        The sum, and the two terms (q1 against k2, q2 against k1).
    """
    labels = np.arange(len(query1), dtype=np.int64)
    one = info_nce(
        ops, ops.l2_normalize(query1), ops.l2_normalize(key2), labels, temperature=temperature
    )
    two = info_nce(
        ops, ops.l2_normalize(query2), ops.l2_normalize(key1), labels, temperature=temperature
    )
    return one + two, (one, two)


def queue_logits(
    ops: Ops, query: Tensor, key: Tensor, queue: Tensor, *, temperature: float
) -> Tensor:
    """Cosine similarities over T of each query with its own key and with the queue's (MoCo v1).

    Args:
        query: (N, D), not normalised.
        key: (N, D), unit rows, no gradient: row i is query i's positive.
        queue: (D, K), unit columns, no gradient. It must keep its values until the gradients are
            there.
        temperature: dimensionless.

    Returns:
        (N, 1+K), column 0 the positives.
    """
    # Dividing the queries touches N*D numbers; dividing the logits would touch N*K.
    query = ops.l2_normalize(query) / temperature
    return ops.concat([ops.row_dot(query, key), ops.matmul(query, queue)], axis=1)
