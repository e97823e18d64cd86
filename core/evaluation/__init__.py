"""What features are worth: protocols on one evaluation split."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from triptych.core.evaluation import knn
from triptych.core.evaluation.row import Evaluation
from triptych.core.evaluation.split import Split
from triptych.core.evaluation.subject import Subject


@dataclass(frozen=True)
class FeatureProtocol:
    """One way to judge frozen features.

    Attributes:
        summary: a few words for the command line's help.
        row: the model of its rows, which has its line for the terminal and its headline metric.
        rows: evaluates; raises as ``Split.features``.
    """

    summary: str
    row: type[Evaluation]
    rows: Callable[[Split, Subject], Sequence[Evaluation]]


PROTOCOLS = {
    "knn": FeatureProtocol("weighted nearest neighbours", knn.KnnRow, knn.rows),
}
"""By the name that a row has under "eval" and that ``tools/eval.py`` takes."""
WHILE_TRAINING = "knn"
"""The protocol of the evaluations every ``evaluate.every`` steps."""
