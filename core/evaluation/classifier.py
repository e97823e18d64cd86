"""Accuracy and loss of the classifiers of a linear probe or a fine-tuned encoder."""

from collections.abc import Iterator
from typing import cast

import numpy as np
from pydantic import Field, FiniteFloat, NonNegativeInt

from triptych.core.config.spec import LinearSpec, SupervisedSpec
from triptych.core.contracts import Array
from triptych.core.data import labels_of
from triptych.core.engine import Engine
from triptych.core.errors import NonFiniteError, UserError
from triptych.core.evaluation.row import Share, SplitRow
from triptych.core.evaluation.scores import Scores, Tally, counted
from triptych.core.evaluation.sharing import Met, Sharing
from triptych.core.evaluation.split import Split
from triptych.core.evaluation.subject import Check, never
from triptych.core.parameters import parts

TITLES = {"linear": "linear probe", "finetune": "fine-tuning"}
"""Name of the method, which is that of the evaluation -> title."""


class ClassifierRow(SplitRow):
    """The results of the classifiers of one branch.

    A linear probe with several classifiers is judged by the best one.

    Attributes:
        branch: "student", or "teacher" for the average of the weights.
        averaged: whether the run has an average of the weights, which it is judged by.
        top1: share of the images whose label has the largest logit, 0 to 1. Among equal logits the
            label counts as the last.
        top5: share of the images whose label is among the five largest logits.
        loss: mean cross-entropy, nats.
        head: position of the classifier with the largest top1; of equal ones the last.
        rate: learning rate of this classifier relative to ``optim.lr``; None if it is the only one.
        weight_decay: of this classifier; None: ``optim.weight_decay``.
        heads: rate, weight_decay, top1, top5 and loss of each classifier, if there are several.
        trained_on: "augmented" or "cached" features for a linear probe, as its spec says.
        images: number of images.
    """

    branch: str = "student"
    averaged: bool = False
    top1: Share
    top5: Share | None = None
    loss: FiniteFloat | None = None
    head: NonNegativeInt = 0
    rate: FiniteFloat | None = None
    weight_decay: FiniteFloat | None = None
    heads: list[dict[str, float | None]] = Field(default_factory=list)
    trained_on: str | None = None
    images: int = 0

    @property
    def title(self) -> str:
        """See ``Evaluation``."""
        return TITLES.get(self.eval, self.eval)

    @property
    def main(self) -> bool:
        """The row of the average of the weights, if there is one."""
        return self.branch == "teacher" or not self.averaged

    @property
    def variant(self) -> str:
        """See ``Evaluation``."""
        return "" if self.main else "without average"

    @property
    def tag(self) -> str:
        """See ``Evaluation``."""
        return self.eval if self.main else f"{self.eval}/{self.branch}"

    def line(self) -> str:
        """See ``Evaluation``."""
        details = []
        if self.top5 is not None:
            details.append(f"top-5 {100 * self.top5:.2f} %")
        if self.loss is not None:
            details.append(f"loss {self.loss:.4f}")
        if self.averaged:
            details.append("average of the weights" if self.main else self.variant)
        if self.heads:
            decay = "" if self.weight_decay is None else f", weight decay {self.weight_decay:g}"
            best = f"head {self.head}, rate {self.rate:g}{decay}"
            details.append(f"best of {len(self.heads)} classifiers: {best}")
        if self.trained_on:
            details.append(f"on {self.trained_on} features")
        details.append(f"{self.images} images")
        return f"{super().line()} {self.noted(details)}"


def check(split: Split) -> None:
    """Raises UserError if a held-out image has no label, or one beyond the classifier's classes."""
    name, classes = split.spec.data.name, cast(SupervisedSpec, split.spec.method).classes
    labels = labels_of(split.queries, np.arange(len(split.queries)))
    if (labels < 0).any():
        raise UserError(
            f"evaluate: {int((labels < 0).sum())} of the {len(labels)} held-out images of "
            f"data.name {name} have no label; a classifier cannot be evaluated on them"
        )
    if labels.max() >= classes:
        raise UserError(
            f"method.classes: {classes}, but a held-out image has label {labels.max()}; labels "
            "begin at 0"
        )


def rows(split: Split, engine: Engine, step: int, check: Check = never) -> list[ClassifierRow]:
    """A row of the average of the weights, if there is one, and a row of the weights.

    Args:
        step: optimizer steps that trained the weights.
        check: as in ``Subject``.

    Raises:
        UserError: a damaged file (see ``data.on_error``), no readable image, or a worker died.
        NonFiniteError: a logit is not finite.
    """
    results, met = evaluate(split, engine, step, check)
    return [_row(split, branch, len(results) > 1, found, met, step) for branch, found in results]


def evaluate(
    split: Split, engine: Engine, step: int, check: Check = never
) -> tuple[list[tuple[str, Scores]], Met]:
    """The scores of each branch on the held-out images, and what was met on reading them.

    Arguments and errors are those of ``rows``.
    """
    averaged = parts(engine.spec).teacher == "everything"
    tallies = {branch: Tally() for branch in (["teacher"] if averaged else []) + ["student"]}

    def compute(images: Array, index: Array) -> list[Array]:
        check()
        found: list[Array] = []
        for branch in tallies:
            logits = engine.classify(images, branch=branch)
            if not np.isfinite(logits).all():
                raise NonFiniteError(f"evaluation after step {step}: logits not finite")
            found += counted(logits, labels_of(split.queries, index))
        return found

    met = Met()
    for found, index in split.computed(split.queries, met, compute, Sharing(engine)):
        pairs = zip(found[::2], found[1::2], strict=True)
        for tally, (sums, predicted) in zip(tallies.values(), pairs, strict=True):
            tally.take(sums, predicted, labels_of(split.queries, index))
    return [(branch, tally.scores()) for branch, tally in tallies.items()], met


def _row(
    split: Split, branch: str, averaged: bool, found: Scores, met: Met, step: int
) -> ClassifierRow:
    method = split.spec.method
    heads = list(_heads(method, found)) if isinstance(method, LinearSpec) else []
    best = found.best
    return ClassifierRow(
        eval=method.name,
        step=step,
        branch=branch,
        averaged=averaged,
        top1=found.top1[best],
        top5=found.top5[best],
        loss=found.loss[best],
        head=best,
        rate=heads[best]["rate"] if len(heads) > 1 else None,
        weight_decay=heads[best]["weight_decay"] if len(heads) > 1 else None,
        heads=heads if len(heads) > 1 else [],
        trained_on=method.features if isinstance(method, LinearSpec) else None,
        images=len(found.labels),
        split=met.digest[:16],
        skipped=len(met.skipped),
        image_warnings=len(met.warned),
    )


def _heads(method: LinearSpec, found: Scores) -> Iterator[dict[str, float | None]]:
    values = zip(method.probes, found.top1, found.top5, found.loss, strict=True)
    for probe, top1, top5, loss in values:
        numbers = {"top1": float(top1), "top5": float(top5), "loss": float(loss)}
        yield {"rate": probe.rate, "weight_decay": probe.weight_decay, **numbers}
