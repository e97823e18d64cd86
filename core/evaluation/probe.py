"""Linear probe on features that are computed once: multinomial logistic regression.

A quick stand-in for the published probes (``method.name: linear``), which see augmented images.
"""

import warnings

import numpy as np
from pydantic import FiniteFloat

from triptych.core.config.evaluate import ProbeSpec
from triptych.core.contracts import Array
from triptych.core.evaluation.knn import TOP, ranks
from triptych.core.evaluation.row import Share, SplitRow
from triptych.core.evaluation.split import Halves, require_classes
from triptych.core.evaluation.subject import Subject

TOLERANCE = 1e-6
"""Largest component of the gradient at which L-BFGS stops."""


class ProbeRow(SplitRow):
    """Accuracy of a linear classifier of the queries.

    Attributes:
        trained_on: "cached" features: computed once, without augmentation.
        tokens: as in ``Subject``.
        top1: share of the queries whose predicted class is their label, 0 to 1.
        top5: share of the queries whose label is among the five first classes.
        penalty: as in ``classify``.
        standardize: as in ``classify``.
        iterations: number of iterations of L-BFGS.
        bank: number of labelled images.
        queries: number of classified images.
    """

    trained_on: str = "cached"
    tokens: str = ""
    top1: Share
    top5: Share | None = None
    penalty: FiniteFloat
    standardize: bool = True
    iterations: int = 0
    bank: int = 0
    queries: int = 0

    @property
    def title(self) -> str:
        """See ``Evaluation``."""
        return "cached linear probe"

    def line(self) -> str:
        """See ``Evaluation``."""
        parts = [
            f"{self.trained_on} features",
            f"penalty {self.penalty:g}",
            f"{self.iterations} iterations",
            f"{self.branch} {self.tokens}",
            f"{self.bank} labelled",
            f"{self.queries} queries",
        ]
        return f"{super().line()} {self.noted(parts)}"


def check(halves: Halves) -> None:
    """Raises UserError for the reasons of ``require_classes``."""
    require_classes(halves, "a linear probe")


def rows(halves: Halves, subject: Subject) -> list[ProbeRow]:
    """One row.

    Raises:
        UserError, NonFiniteError: as in ``Halves.features``.
    """
    settings = halves.spec.evaluate.probe
    features = halves.features(subject)
    bank, queries = features.bank, features.queries
    subject.check()
    scores, iterations = classify(bank.features, bank.labels, queries.features, settings)
    rank = ranks(scores, queries.labels)
    row = ProbeRow(
        eval="probe",
        step=subject.step,
        branch=subject.branch,
        tokens=subject.tokens,
        top1=float(np.mean(rank < 1)),
        top5=float(np.mean(rank < TOP)),
        penalty=settings.penalty,
        standardize=settings.standardize,
        iterations=iterations,
        bank=len(bank.labels),
        queries=len(queries.labels),
        split=features.digest,
        skipped=features.skipped,
        image_warnings=features.image_warnings,
    )
    return [row]


def classify(bank: Array, labels: Array, queries: Array, settings: ProbeSpec) -> tuple[Array, int]:
    """Scores of a classifier W, b that minimises ``mean CE + penalty/2 |W|^2`` on the bank.

    CE is the cross entropy of the softmax over the classes; of two classes it is that of a sigmoid.

    Args:
        bank: (N, D).
        labels: (N,) int64; two classes or more.
        queries: (Q, D).

    Returns:
        Scores (Q, C) float64, and the number of iterations. C is the largest label plus 1; a class
        without labelled images has the score -inf.
    """
    from sklearn.linear_model import LogisticRegression  # slow to import

    bank, queries = (rows.astype(np.float64) for rows in (bank, queries))
    if settings.standardize:
        mean, deviation = bank.mean(axis=0), bank.std(axis=0)
        scale = np.where(deviation > 0, deviation, 1.0)
        bank, queries = ((rows - mean) / scale for rows in (bank, queries))
    solver = LogisticRegression(
        C=1 / (settings.penalty * len(bank)), tol=TOLERANCE, max_iter=settings.iterations
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the row has the number of iterations
        solver.fit(bank, labels)
    found = solver.decision_function(queries)
    if found.ndim == 1:
        found = np.stack([-found, found], axis=1)
    scores = np.full((len(queries), int(labels.max()) + 1), -np.inf)
    scores[:, solver.classes_] = found
    return scores, int(solver.n_iter_.max())
