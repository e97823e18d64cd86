"""Contrastive losses over ``ops``.

The caller passes keys gathered from all ranks, and labels; the losses know no rank.

Shape letters: N queries, M keys, D feature width.
"""

from triptych.core.contracts import Index, Ops, Tensor


def info_nce(ops: Ops, query: Tensor, keys: Tensor, labels: Index, *, temperature: float) -> Tensor:
    """2 T times the cross-entropy of cosine similarity / T (MoCo v3, equation 1).

    Args:
        query: (N, D), unit rows.
        keys: (M, D), unit rows, no gradient; gathered over replicas.
        labels: (N,) int64, the row of each query's positive key.
        temperature: T, dimensionless.
    """
    # Dividing the queries touches N*D numbers; dividing the logits would touch N*M.
    logits = ops.matmul(query / temperature, keys, transpose_b=True)
    loss = ops.cross_entropy(logits, ops.labels(labels, logits))
    return 2.0 * temperature * loss


def queue_logits(
    ops: Ops, query: Tensor, key: Tensor, queue: Tensor, *, temperature: float
) -> Tensor:
    """Cosine similarity / T of each query with its positive key and with the queue (MoCo v1).

    Args:
        query: (N, D), not normalised.
        key: (N, D), unit rows, no gradient. Row i is the positive key of query i.
        queue: (D, K), unit columns, no gradient. Its values must not change before the backward
            pass is done.
        temperature: T, dimensionless.

    Returns:
        (N, 1+K). Column 0 holds the positives.
    """
    # Dividing the queries touches N*D numbers; dividing the logits would touch N*K.
    query = ops.l2_normalize(query) / temperature
    return ops.concat([ops.row_dot(query, key), ops.matmul(query, queue)], axis=1)
