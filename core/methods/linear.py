"""Linear probe: linear classifiers on the features of a frozen encoder.

MoCo v1 (arXiv 1911.05722, section 4.1), MoCo v3 (arXiv 2104.02057, section 5), and MOCA (arXiv
2307.09361) with a grid of learning rates.
"""

from collections.abc import Mapping
from functools import reduce
from operator import add
from typing import cast

from triptych.core.config.spec import LinearSpec, RunSpec
from triptych.core.contracts import Array, Batch, Hyper, LinearModel, Outcome, Step, Tensor
from triptych.core.methods.supervised import (
    CHANCE,
    FLAT,
    LOSSES,
    REMEDY,
    WHOLE,
    chance,
    settled,
    spread,
    targets,
)
from triptych.core.methods.supervised import status as accuracies

__all__ = [
    "CHANCE",
    "FLAT",
    "LOSSES",
    "REMEDY",
    "WHOLE",
    "chance",
    "check_draws",
    "draws",
    "finish",
    "judged",
    "loss",
    "places",
    "predict",
    "prepare",
    "settled",
    "spread",
    "status",
    "targets",
]


def judged(values: Mapping[str, float]) -> float:
    """The loss of the best classifier. Of a sweep, some rates are too large to learn with."""
    return min(_losses(values), default=values["loss"])


def status(values: Mapping[str, float]) -> list[str]:
    """The accuracy on the batch; of several classifiers the least loss."""
    best = [f"best of {len(_losses(values))}: loss {judged(values):.3f}"]
    return best if _losses(values) else accuracies(values)


def _losses(values: Mapping[str, float]) -> list[float]:
    """The losses of several classifiers."""
    return [value for name, value in values.items() if name.startswith("loss_")]


def draws(spec: RunSpec, step: int) -> dict[str, Array]:
    """Nothing: a probe needs random numbers for its augmented view only."""
    return {}


def check_draws(spec: RunSpec, draws: Mapping[str, Array]) -> None:
    """Nothing: there are no draws."""


def prepare(batch: Batch, draws: Mapping[str, Array], spec: LinearSpec) -> Batch:
    """The batch as it is."""
    return batch


def places(step: Step[LinearModel, LinearSpec], part: Batch, batch: Batch) -> dict[str, Array]:
    """``labels`` (n,): the class of each image."""
    return {"labels": cast(Array, part.labels)}


def predict(step: Step[LinearModel, LinearSpec], part: Batch, number: int) -> Tensor:
    """The features that the classifiers get, (N, D), without gradient.

    Args:
        part: one view, (N, C, H, W); or cached features (N, D).
    """
    if step.spec.features == "cached":
        return part.views[0]
    with step.ops.no_grad():
        return step.model.frozen(part.views[0])


def loss(
    step: Step[LinearModel, LinearSpec],
    part: Batch,
    features: Tensor,
    targets: Mapping[str, Tensor],
    number: int,
) -> Outcome:
    """The sum of the classifiers' losses. No classifier's gradient depends on another.

    The logged loss is the mean over the classifiers. Of several, each has its own "loss_<i>".

    Args:
        part: with labels.
        features: (N, D).
    """
    ops = step.ops
    logits = step.model.logits(features)
    labels = ops.labels(part.places["labels"], logits[0])
    losses = [ops.cross_entropy(scores, labels) for scores in logits]
    total = reduce(add, losses)
    metrics = {"loss": total / len(losses)}
    if len(losses) == 1:
        metrics["acc1"], metrics["acc5"] = ops.accuracy(logits[0], labels, top=(1, 5))
    else:
        metrics.update({f"loss_{i}": value for i, value in enumerate(losses)})
    return Outcome(total, metrics, {"features": features})


def finish(model: LinearModel, outcome: Outcome, hyper: Hyper) -> None:
    """Nothing: a probe has no teacher and no memory."""
