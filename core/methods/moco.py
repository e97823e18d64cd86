"""MoCo v1 and v2: the order of one step over ``ops`` (arXiv 1911.05722, algorithm 1; 2003.04297).

The two versions differ in heads, temperature and augmentation. The spec holds all three.
"""

import math
from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np

from triptych.core.config.spec import QueueSpec, RunSpec
from triptych.core.contracts import Array, Batch, Hyper, Outcome, QueueModel, Step, Targets, Tensor
from triptych.core.methods.accumulate import by_parts, joined, rows_of
from triptych.core.methods.health import FLAT_SPREAD
from triptych.core.methods.losses import queue_logits
from triptych.core.random import check_order, stream

FLAT = FLAT_SPREAD
REMEDY = "raise method.momentum, or keep batch_norm.virtual_ranks above 1"

CHANCE = "the loss is {:.4f} where nothing is learned"

LOSSES = 1
WHOLE = False


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


def places(step: Step[QueueModel, QueueSpec], part: Batch, batch: Batch) -> dict[str, Array]:
    """Where images and keys go.

    Returns:
        ``labels`` (n,): the column of each image's positive key.
        ``shuffled`` (n,): the images that the key encoder sees in the place of these.
        ``restored`` (N,): the place of each image's key, with the first micro-batch.
    """
    order = step.draws["shuffle_perm"]
    found = {"labels": np.zeros(len(part.index), np.int64), "shuffled": order[part.rows]}
    return {**found, "restored": np.argsort(order)} if part.first == batch.first else found


def targets(step: Step[QueueModel, QueueSpec], parts: Sequence[Batch]) -> Targets:
    """Updates the teacher, and computes the keys of the second view, unit rows."""
    ops, model = step.ops, step.model
    # The teacher may follow running statistics of the student that this step has moved.
    tracked = step.spec.teacher_statistics != "own"
    if tracked:
        by_parts(step, parts, "student", lambda part: predict(step, part, 0))
    # The teacher takes the student's weights from before this step's update (section 3.2).
    model.update_teacher(step.hyper.ema)
    # The shuffle gives the batch norm of a key other images than that of its query (section 3.3).
    images = step.replicas.gather(joined(ops, [part.views[1] for part in parts], parts))
    shuffled = by_parts(
        step,
        parts,
        "teacher",
        lambda part: _features(model, "teacher", ops.gather_rows(images, part.places["shuffled"])),
    )
    gathered = step.replicas.gather(ops.l2_normalize(shuffled))
    key = ops.gather_rows(gathered, parts[0].places["restored"])
    values = [{"key": rows_of(key, part)} for part in parts]
    own = joined(ops, [value["key"] for value in values], parts)
    return Targets(values, features={"key": own}, kept={"key": key}, tracked=tracked)


def predict(step: Step[QueueModel, QueueSpec], part: Batch, number: int) -> Tensor:
    """The queries of the first view, not normalised. (N, C, H, W) -> (N, D)."""
    return _features(step.model, "student", part.views[0])


def _features(model: QueueModel, branch: str, view: Tensor) -> Tensor:
    """Encoder and projector, which has no batch norm. (N, C, H, W) -> (N, D)."""
    return model.projected(branch, model.encoded(branch, view))


def loss(
    step: Step[QueueModel, QueueSpec],
    part: Batch,
    features: Tensor,
    targets: Mapping[str, Tensor],
    number: int,
) -> Outcome:
    """The loss against positive keys and queue, the accuracy, and the features.

    The accuracy ("acc1", "acc5") says how often the positive key is among the nearest 1 or 5.

    Args:
        features: (N, D), queries, not normalised.
        targets: "key", unit rows.
    """
    ops, queue = step.ops, step.model.memory.queue
    logits = queue_logits(ops, features, targets["key"], queue, temperature=step.spec.temperature)
    labels = ops.labels(part.places["labels"], logits)
    top1, top5 = ops.accuracy(logits, labels, top=(1, 5))
    value = ops.cross_entropy(logits, labels)
    return Outcome(value, {"acc1": top1, "acc5": top5}, {"q_raw": features})


def finish(model: QueueModel, outcome: Outcome, hyper: Hyper) -> None:
    """Puts the step's keys into the queue.

    The queue must not change earlier, since the backward pass reads the values that the forward
    pass saw. PyTorch and Paddle would raise an error, and OneFlow would silently give wrong
    gradients. The alternative, a copy of the queue, would cost time and memory.
    """
    model.memory.enqueue(outcome.kept["key"])
