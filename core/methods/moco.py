"""MoCo v1 and v2: the order of one step over ``ops`` (arXiv 1911.05722, algorithm 1; 2003.04297).

The two differ in their heads, temperature and augmentation, which are all in the spec.
"""

import math
from collections.abc import Mapping
from typing import cast

import numpy as np

from triptych.core.config.spec import QueueSpec, RunSpec
from triptych.core.contracts import Array, Hyper, Ops, Outcome, QueueModel, Tensor
from triptych.core.methods.health import FLAT_SPREAD
from triptych.core.methods.losses import queue_logits
from triptych.core.random import check_order, stream

FLAT = FLAT_SPREAD
REMEDY = "raise method.momentum, or keep batch_norm.virtual_ranks above 1"

CHANCE = "the loss is {:.4f} where nothing is learned"


def chance(spec: RunSpec) -> float:
    """Loss when every key is as likely as the positive one: ln(1 + K)."""
    return math.log(1 + cast(QueueSpec, spec.method).queue_size)


def spread(values: Mapping[str, float]) -> float:
    """The features' (``core.engine.feature_std``)."""
    return values["feature_std"]


def status(values: Mapping[str, float]) -> list[str]:
    """Nothing: loss and spread say all."""
    return []


def settled(spec: RunSpec) -> int:
    """Steps until the queue holds keys only: its random start is told from a key at no cost."""
    return math.ceil(cast(QueueSpec, spec.method).queue_size / spec.train.batch_size)


def draws(spec: RunSpec, step: int) -> dict[str, Array]:
    """``shuffle_perm``, (N,) int64: the order in which the key encoder sees the images."""
    order = stream(spec.seed, "shuffle", step).permutation(spec.train.batch_size)
    return {"shuffle_perm": order}


def check_draws(spec: RunSpec, draws: Mapping[str, Array]) -> None:
    """Raises ValueError for draws of the right names, shapes and types that no run could draw."""
    check_order("shuffle_perm", draws["shuffle_perm"])


def forward(
    ops: Ops,
    model: QueueModel,
    views: tuple[Tensor, ...],
    draws: Mapping[str, Array],
    hyper: Hyper,
    spec: QueueSpec,
) -> Outcome:
    """Queries, then the EMA, then shuffled keys, then the loss against keys and queue.

    Args:
        views: two of (N, C, H, W), for queries and for keys.
    """
    query = model.query(views[0])
    with ops.no_grad():
        # The teacher takes the student's weights from before this step's update (section 3.2).
        model.update_teacher(hyper.ema)
        # Shuffled, a key's batch norm sees other images than its query's did (section 3.3).
        order = draws["shuffle_perm"]
        shuffled = ops.l2_normalize(model.key(ops.gather_rows(views[1], order)))
        key = ops.gather_rows(shuffled, np.argsort(order))
    return outcome(ops, model, query, key, spec)


def outcome(ops: Ops, model: QueueModel, query: Tensor, key: Tensor, spec: QueueSpec) -> Outcome:
    """The loss against own keys and queue, how often the own key is nearest, and the features.

    Args:
        query: (N, D), not normalised.
        key: (N, D), unit rows.
    """
    logits = queue_logits(ops, query, key, model.memory.queue, temperature=spec.temperature)
    labels = ops.labels(np.zeros(len(query), np.int64), logits)
    top1, top5 = ops.accuracy(logits, labels, top=(1, 5))
    loss = ops.cross_entropy(logits, labels)
    return Outcome(loss, {"acc1": top1, "acc5": top5}, {"q_raw": query, "key": key}, {"key": key})


def finish(model: QueueModel, outcome: Outcome) -> None:
    """The step's keys enter the queue.

    Not before the backward pass is done, which reads the queue as the forward pass saw it. PyTorch
    and Paddle would refuse, OneFlow would give wrong gradients without a word; a copy of the queue
    would do as well, and cost one.
    """
    model.memory.enqueue(outcome.kept["key"])
