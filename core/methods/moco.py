"""MoCo v1 and v2: the order of one step over ``ops`` (arXiv 1911.05722, algorithm 1; 2003.04297).

The two versions differ in heads, temperature and augmentation. The spec holds all three.
"""

import math
from collections.abc import Mapping
from typing import cast

import numpy as np

from triptych.core.config.spec import QueueSpec, RunSpec
from triptych.core.contracts import Array, Batch, Hyper, Ops, Outcome, QueueModel, Tensor
from triptych.core.methods.health import FLAT_SPREAD
from triptych.core.methods.losses import queue_logits
from triptych.core.random import check_order, stream

FLAT = FLAT_SPREAD
REMEDY = "raise method.momentum, or keep batch_norm.virtual_ranks above 1"

CHANCE = "the loss is {:.4f} where nothing is learned"


def chance(spec: RunSpec) -> float:
    """The loss if every key is as likely as the positive one: ln(1 + K)."""
    return math.log(1 + cast(QueueSpec, spec.method).queue_size)


def judged(values: Mapping[str, float]) -> float:
    """The loss of the step."""
    return values["loss"]


def spread(values: Mapping[str, float]) -> float:
    """The spread of the features (``core.methods.health.feature_std``)."""
    return values["feature_std"]


def status(values: Mapping[str, float]) -> list[str]:
    """Nothing: the loss and the feature spread suffice."""
    return []


def settled(spec: RunSpec) -> int:
    """Steps until the random initial queue is overwritten.

    Before that the loss is low for free: random vectors are easy negatives.
    """
    return math.ceil(cast(QueueSpec, spec.method).queue_size / spec.train.batch_size)


def draws(spec: RunSpec, step: int) -> dict[str, Array]:
    """The order in which the key encoder sees the images.

    Returns:
        ``shuffle_perm``: (N,) int64.
    """
    order = stream(spec.seed, "shuffle", step).permutation(spec.train.batch_size)
    return {"shuffle_perm": order}


def check_draws(spec: RunSpec, draws: Mapping[str, Array]) -> None:
    """See ``core.contracts.Method``."""
    check_order("shuffle_perm", draws["shuffle_perm"])


def prepare(batch: Batch, draws: Mapping[str, Array], spec: QueueSpec) -> Batch:
    """The batch as it is."""
    return batch


def forward(
    ops: Ops,
    model: QueueModel,
    batch: Batch,
    draws: Mapping[str, Array],
    hyper: Hyper,
    spec: QueueSpec,
) -> Outcome:
    """Computes queries, updates the teacher, then computes shuffled keys and the loss.

    Args:
        batch: two views (N, C, H, W), the first for queries and the second for keys.
    """
    query = model.query(batch.views[0])
    with ops.no_grad():
        # The teacher takes the student's weights from before this step's update (section 3.2).
        model.update_teacher(hyper.ema)
        # The shuffle gives the batch norm of a key other images than that of its query
        # (section 3.3).
        order = draws["shuffle_perm"]
        shuffled = ops.l2_normalize(model.key(ops.gather_rows(batch.views[1], order)))
        key = ops.gather_rows(shuffled, np.argsort(order))
    return outcome(ops, model, query, key, spec)


def outcome(ops: Ops, model: QueueModel, query: Tensor, key: Tensor, spec: QueueSpec) -> Outcome:
    """The loss against positive keys and queue, the accuracy, and the features.

    The accuracy ("acc1", "acc5") says how often the positive key is among the nearest 1 or 5.

    Args:
        query: (N, D), not normalised.
        key: (N, D), unit rows.
    """
    logits = queue_logits(ops, query, key, model.memory.queue, temperature=spec.temperature)
    labels = ops.labels(np.zeros(len(query), np.int64), logits)
    top1, top5 = ops.accuracy(logits, labels, top=(1, 5))
    loss = ops.cross_entropy(logits, labels)
    return Outcome(loss, {"acc1": top1, "acc5": top5}, {"q_raw": query, "key": key}, {"key": key})


def finish(model: QueueModel, outcome: Outcome, hyper: Hyper) -> None:
    """Puts the step's keys into the queue.

    The queue must not change earlier, since the backward pass reads the values that the forward
    pass saw. PyTorch and Paddle would raise an error, and OneFlow would silently give wrong
    gradients. The alternative, a copy of the queue, would cost time and memory.
    """
    model.memory.enqueue(outcome.kept["key"])
