"""Low-shot classification: logistic regression on few labelled images.

The protocol of MSN (arXiv 2204.07141) and MOCA (arXiv 2307.09361): a linear classifier without
intercept is trained on frozen features of a few images per class, and classifies the queries.

Shape letters:
    N: labelled images.
    Q: queries.
    D: feature width.
    K: classes.
"""

import warnings
from collections.abc import Sequence
from itertools import islice
from typing import Annotated, Any

import numpy as np
from pydantic import ConfigDict, Field, FiniteFloat

from triptych.core.config.lowshot import LowshotSpec
from triptych.core.contracts import Array
from triptych.core.errors import UserError
from triptych.core.evaluation.row import Share, SplitRow
from triptych.core.evaluation.shots import Shots, splits
from triptych.core.evaluation.split import Features, Halves
from triptych.core.evaluation.subject import Subject

TOLERANCE = 1e-12
"""Largest component of the gradient of the mean loss at which the solver stops."""
CONVERGED = 1e-9
"""Largest component of that gradient of a minimum, where features are of unit length."""
ITERATIONS = 1000
"""Most Newton steps. About ten are needed."""
QUERIES = 1024
"""Number of queries that are classified at once."""


class LowshotRow(SplitRow):
    """Accuracy with one number of labelled images and one lambda, over all splits.

    Attributes:
        tokens: as in ``Subject``.
        final_norm: as in ``core.evaluation.subject.Choice``.
        blocks: as in ``core.evaluation.subject.Choice``.
        interpolation: "bilinear" or "bicubic", of the images.
        center: as in ``prepare``.
        normalize: as in ``prepare``.
        shots: number of labelled images per class, or their share of each class, e.g. "1%".
        penalty: lambda of the objective, see ``fit``; the row's key is "lambda".
        top1: share of the queries whose predicted class is their label, 0 to 1; mean over splits.
        std: population standard deviation of that share over splits, 0 to 1.
        each: that share for each split.
        origins: the seed that drew each split, or the file that names its images.
        digests: identifies the labelled images of each split.
        labelled: number of labelled images of each split.
        queries: number of classified images.
        classes: number of classes.
    """

    model_config = ConfigDict(populate_by_name=True)

    tokens: str = ""
    final_norm: bool = True
    blocks: int = 1
    interpolation: str = ""
    center: bool = True
    normalize: bool = True
    shots: int | str
    penalty: Annotated[FiniteFloat, Field(alias="lambda")]
    top1: Share
    std: Share = 0.0
    each: tuple[Share, ...] = ()
    origins: tuple[int | str, ...] = ()
    digests: tuple[str, ...] = ()
    labelled: tuple[int, ...] = ()
    queries: int = 0
    classes: int = 0

    @property
    def title(self) -> str:
        """See ``Evaluation``."""
        return "low-shot"

    @property
    def variant(self) -> str:
        """See ``Evaluation``."""
        amount = f"{self.shots} per class" if isinstance(self.shots, int) else str(self.shots)
        return f"{amount}, lambda {self.penalty:g}"

    @property
    def tag(self) -> str:
        """See ``Evaluation``."""
        return f"{self.eval}/{self.shots}/{self.penalty:g}"

    def line(self) -> str:
        """See ``Evaluation``."""
        parts = [
            self.variant,
            f"{self.branch} {self.tokens}",
            f"{self.queries} queries",
            f"{len(self.each)} splits" if len(self.each) > 1 else "1 split",
        ]
        return f"{super().line()} +- {100 * self.std:.2f} {self.noted(parts)}"

    def as_json(self) -> dict[str, Any]:
        """See ``Evaluation``."""
        return self.model_dump(mode="json", by_alias=True)


def rows(split: Halves, subject: Subject) -> list[LowshotRow]:
    """One row for each number of labelled images and each lambda of ``evaluate.lowshot``.

    Only the labelled images and the queries are embedded.

    Raises:
        UserError: as in ``Halves.features`` and ``shots.splits``, or the data have no two classes,
            or all labelled images of a class are damaged.
        NonFiniteError: as in ``Halves.features``.
    """
    settings = split.spec.evaluate.lowshot
    catalogue = split.catalogue()
    if len(catalogue.classes) < 2:
        raise UserError("evaluate.lowshot: the data have one class; a classifier needs two")
    groups = splits(settings, catalogue)
    needed = np.unique(np.concatenate([s.index for group in groups.values() for s in group]))
    features = split.features(subject, needed)
    chosen = {
        label: [_positions(shots, features, len(catalogue.classes)) for shots in group]
        for label, group in groups.items()
    }
    fits = [(i, penalty) for rows in chosen.values() for penalty in settings.lambdas for i in rows]
    results = iter(_accuracies(settings, features, fits, subject))
    made = []
    for label, group in groups.items():
        for penalty in settings.lambdas:
            each = list(islice(results, len(group)))
            row = LowshotRow(
                eval="lowshot",
                step=subject.step,
                branch=subject.branch,
                tokens=subject.tokens,
                final_norm=subject.choice.final_norm,
                blocks=subject.choice.blocks,
                interpolation=subject.choice.interpolation or split.spec.augment.eval_interpolation,
                center=settings.center,
                normalize=settings.normalize,
                shots=label,
                penalty=penalty,
                top1=float(np.mean(each)),
                std=float(np.std(each)),
                each=tuple(each),
                origins=tuple(shots.origin for shots in group),
                digests=tuple(shots.digest(catalogue) for shots in group),
                labelled=tuple(len(index) for index in chosen[label]),
                queries=len(features.queries.labels),
                classes=len(catalogue.classes),
                split=features.digest,
                skipped=features.skipped,
                image_warnings=features.image_warnings,
            )
            made.append(row)
    return made


def _accuracies(
    settings: LowshotSpec,
    features: Features,
    fits: Sequence[tuple[Array, float]],
    subject: Subject,
) -> list[float]:
    """Shares of the queries that classifiers predict; processes share the fits.

    Args:
        fits: of each classifier, the rows of the bank that it learns from, and lambda.
    """
    bank, queries = (
        prepare(half.features, center=settings.center, normalize=settings.normalize)
        for half in (features.bank, features.queries)
    )

    def top1(numbers: Array) -> list[Array]:
        shares = []
        for index, penalty in (fits[number] for number in numbers):
            subject.check()
            weight = fit(bank[index], features.bank.labels[index], penalty)
            shares.append(np.mean(predict(weight, queries) == features.queries.labels))
        return [np.array(shares)]

    (shares,) = subject.sharing.by_rows(np.arange(len(fits)), top1)
    found: list[float] = shares.tolist()
    return found


def _positions(shots: Shots, features: Features, classes: int) -> Array:
    """Rows of the embedded bank that belong to a split; raises UserError if a class has none."""
    rows: Array = np.flatnonzero(np.isin(features.bank.index, shots.index))
    if len(np.unique(features.bank.labels[rows])) < classes:
        raise UserError(
            f"evaluate.lowshot: {shots.label} labelled images per class, split {shots.origin}: all "
            "images of a class are damaged; repair them"
        )
    return rows


def prepare(features: Array, *, center: bool = True, normalize: bool = True) -> Array:
    """Features as MOCA's evaluation prepares them, row by row, in float64.

    Args:
        features: (N, D).
        center: whether to subtract from each row its mean over the D dimensions.
        normalize: whether to scale each row to unit length, after that.

    Returns:
        (N, D) float64.
    """
    rows: Array = features.astype(np.float64)
    if center:
        rows = rows - rows.mean(axis=1, keepdims=True)
    if normalize:
        rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    return rows


def fit(features: Array, labels: Array, penalty: float) -> Array:
    """The weights W that minimise ``sum_i CE_i + penalty/2 |W|^2``.

    CE is the cross entropy of the softmax over all classes. There is no intercept.

    Args:
        features: (N, D) float64.
        labels: (N,) int64; each of 0 … K - 1 occurs, and K is 2 or more.
        penalty: lambda, > 0.

    Returns:
        W, (K, D) float64.

    Raises:
        UserError: the solver does not converge.
    """
    from sklearn.linear_model import LogisticRegression  # slow to import, and seldom used

    two = int(labels.max()) == 1
    # With two classes scikit-learn trains one row v with a sigmoid. The softmax has its minimum at
    # the rows -v/2 and v/2, whose penalty is half of v's: so v needs half of lambda.
    inverse = 2 / penalty if two else 1 / penalty
    # The published call is solver="lbfgs" of the same objective. That stops when the loss changes
    # by less than 64 epsilon, where the weights are still 1e-7 off. Newton's steps are exact.
    solver = LogisticRegression(
        C=inverse, fit_intercept=False, solver="newton-cg", tol=TOLERANCE, max_iter=ITERATIONS
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the gradient below tells whether it has converged
        solver.fit(features, labels)
    row: Array = solver.coef_
    weight = np.vstack([-row / 2, row / 2]) if two else row
    _require_minimum(weight, features, labels, penalty)
    return weight


def _require_minimum(weight: Array, features: Array, labels: Array, penalty: float) -> None:
    """Raises UserError unless the gradient of the mean loss is 0 but for rounding."""
    scores = features @ weight.T
    residual = np.exp(scores - scores.max(axis=1, keepdims=True))
    residual /= residual.sum(axis=1, keepdims=True)
    residual[np.arange(len(labels)), labels] -= 1
    gradient = (residual.T @ features + penalty * weight) / len(labels)
    if np.abs(gradient).max() > CONVERGED * max(1.0, np.abs(features).max()):
        raise UserError(
            f"evaluate.lowshot.lambdas: {penalty:g}: no minimum after {ITERATIONS} Newton steps; "
            "raise lambda, or set evaluate.lowshot.normalize"
        )


def predict(weight: Array, features: Array) -> Array:
    """The class with the largest score; of equal scores the lower class.

    Args:
        weight: (K, D).
        features: (Q, D).

    Returns:
        (Q,) int64.
    """
    starts: Sequence[int] = range(0, len(features), QUERIES)
    return np.concatenate(
        [(features[start : start + QUERIES] @ weight.T).argmax(axis=1) for start in starts]
    )
