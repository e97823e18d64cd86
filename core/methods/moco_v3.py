"""MoCo v3: the order of one step over ``ops`` (arXiv 2104.02057, algorithm 1)."""

import math
from collections.abc import Mapping
from typing import cast

from triptych.core.config.spec import MocoV3Spec, RunSpec
from triptych.core.contracts import Array, Batch, Hyper, Model, Ops, Outcome, Tensor
from triptych.core.methods.health import FLAT_SPREAD
from triptych.core.methods.losses import symmetric_info_nce

FLAT = FLAT_SPREAD
REMEDY = "keep model.freeze_patch_embed on"

CHANCE = "the loss is {:.4f} where nothing is learned"


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


def forward(
    ops: Ops,
    model: Model,
    batch: Batch,
    draws: Mapping[str, Array],
    hyper: Hyper,
    spec: MocoV3Spec,
) -> Outcome:
    """Computes queries of both views, updates the teacher, then computes keys and the loss.

    Args:
        batch: two views (N, C, H, W). Each passes the networks separately, so batch norm sees
            one view at a time, view 1 first.
    """
    query1, query2 = model.query(batch.views[0]), model.query(batch.views[1])
    with ops.no_grad():
        # The teacher takes the student's weights from before this step's update (section 3).
        model.update_teacher(hyper.ema)
        key1, key2 = model.key(batch.views[0]), model.key(batch.views[1])
    return outcome(ops, query1, query2, key1, key2, spec)


def outcome(
    ops: Ops, query1: Tensor, query2: Tensor, key1: Tensor, key2: Tensor, spec: MocoV3Spec
) -> Outcome:
    """The loss of both views, its two terms and the features.

    Args:
        query1: (N, D), predictor outputs of view 1, not normalised.
        query2: (N, D), predictor outputs of view 2, not normalised.
        key1: (N, D), teacher outputs of view 1, not normalised.
        key2: (N, D), teacher outputs of view 2, not normalised.
    """
    loss, terms = symmetric_info_nce(ops, query1, query2, key1, key2, temperature=spec.temperature)
    features = {"q1": query1, "q2": query2, "k1": key1, "k2": key2}
    return Outcome(loss, {"loss_q1k2": terms[0], "loss_q2k1": terms[1]}, features)


def finish(model: Model, outcome: Outcome, hyper: Hyper) -> None:
    """Nothing: MoCo v3 has no memory to update."""
