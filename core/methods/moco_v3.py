"""MoCo v3: the order of one step over ``ops`` (arXiv 2104.02057, algorithm 1)."""

import math
from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np

from triptych.core.config.spec import MocoV3Spec, RunSpec
from triptych.core.contracts import Array, Batch, Hyper, Model, Outcome, Step, Targets, Tensor
from triptych.core.methods.accumulate import by_parts
from triptych.core.methods.health import FLAT_SPREAD
from triptych.core.methods.losses import info_nce

FLAT = FLAT_SPREAD
REMEDY = "keep model.freeze_patch_embed on"

CHANCE = "the loss is {:.4f} where nothing is learned"

LOSSES = 2
"""Each view's queries against the other view's keys (algorithm 1). The loss is the sum."""
WHOLE = True


def chance(spec: RunSpec) -> float:
    """The loss if every key is as likely as the positive one: two terms of 2 T ln N each."""
    return 4.0 * cast(MocoV3Spec, spec.method).temperature * math.log(spec.train.batch_size)


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
    """Zero: the loss depends on the features from the first step on."""
    return 0


def draws(spec: RunSpec, step: int) -> dict[str, Array]:
    """Nothing: MoCo v3 needs random numbers for its augmented views only."""
    return {}


def check_draws(spec: RunSpec, draws: Mapping[str, Array]) -> None:
    """Nothing: there are no draws."""


def prepare(batch: Batch, draws: Mapping[str, Array], spec: MocoV3Spec) -> Batch:
    """The batch as it is."""
    return batch


def places(step: Step[Model, MocoV3Spec], part: Batch, batch: Batch) -> dict[str, Array]:
    """``labels`` (N,): the row of each image's key among those of all copies of the model."""
    count = len(batch.index)
    if len(part.index) < count:
        return {}  # the loss is that of the whole batch
    return {"labels": np.arange(count, dtype=np.int64) + step.replicas.rank * count}


def targets(step: Step[Model, MocoV3Spec], parts: Sequence[Batch]) -> Targets:
    """Updates the teacher, and computes the keys of both views, view 1 first.

    Each view passes the networks separately, so batch norm sees one view at a time.
    """
    # The teacher may follow running statistics of the student that this step has moved.
    tracked = step.spec.teacher_statistics != "own"
    if tracked:
        for view in range(2):
            _outputs(step, parts, "student", view)
    # The teacher takes the student's weights from before this step's update (section 3).
    step.model.update_teacher(step.hyper.ema)
    keys = [_outputs(step, parts, "teacher", view) for view in range(2)]
    gathered = [step.replicas.gather(step.ops.l2_normalize(key)) for key in keys]
    values = {"key1": gathered[0], "key2": gathered[1]}
    return Targets([values], features={"k1": keys[0], "k2": keys[1]}, tracked=tracked)


def _outputs(
    step: Step[Model, MocoV3Spec], parts: Sequence[Batch], branch: str, view: int
) -> Tensor:
    """What the networks of a branch give for one view. (N, D)."""
    model = step.model
    features = by_parts(step, parts, branch, lambda part: model.encoded(branch, part.views[view]))
    return model.projected(branch, features)


def predict(step: Step[Model, MocoV3Spec], part: Batch, number: int) -> Tensor:
    """The features of one view: number 0 is view 1. (N, C, H, W) -> (N, D)."""
    return step.model.encoded("student", part.views[number])


def loss(
    step: Step[Model, MocoV3Spec],
    part: Batch,
    features: Tensor,
    targets: Mapping[str, Tensor],
    number: int,
) -> Outcome:
    """The loss of one view's queries against the other view's keys.

    Args:
        features: (N, D), of ``predict``.
        targets: "key1" and "key2", unit rows of all replicas.
    """
    ops = step.ops
    query = step.model.projected("student", features)
    term = info_nce(
        ops,
        ops.l2_normalize(query),
        targets[f"key{2 - number}"],
        part.places["labels"],
        temperature=step.spec.temperature,
    )
    return Outcome(term, {f"loss_q{1 + number}k{2 - number}": term}, {f"q{1 + number}": query})


def finish(model: Model, outcome: Outcome, hyper: Hyper) -> None:
    """Nothing: MoCo v3 has no memory to update."""
