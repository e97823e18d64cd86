"""Protocols that evaluate frozen features on one evaluation split."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from triptych.core.evaluation import knn
from triptych.core.evaluation.row import Evaluation
from triptych.core.evaluation.split import Split
from triptych.core.evaluation.subject import Subject


@dataclass(frozen=True)
class FeatureProtocol:
    """One way to evaluate frozen features.

    Attributes:
        summary: a few words for the command line's help.
        row: the model of its rows, which gives the terminal line and the headline metric.
        rows: runs the evaluation; raises the errors of ``Split.features``.
    """

    summary: str
    row: type[Evaluation]
    rows: Callable[[Split, Subject], Sequence[Evaluation]]


PROTOCOLS = {
    "knn": FeatureProtocol("weighted nearest neighbours", knn.KnnRow, knn.rows),
}
"""Name -> protocol. A row has the name under "eval", and ``tools/eval.py`` takes it."""
WHILE_TRAINING = "knn"
"""Name of the protocol that a run evaluates with every ``evaluate.every`` steps."""
