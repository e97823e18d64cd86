"""Protocols that evaluate frozen features on one evaluation split."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from triptych.core.config.evaluate import EvaluateSpec
from triptych.core.evaluation import classifier, knn, lowshot, probe, rank
from triptych.core.evaluation.row import Evaluation
from triptych.core.evaluation.split import Halves, require_classes
from triptych.core.evaluation.subject import Choice, Subject


@dataclass(frozen=True)
class FeatureProtocol:
    """One way to evaluate frozen features.

    Attributes:
        summary: a few words for the command line's help.
        row: the model of its rows, which gives the terminal line and the headline metric.
        check: raises UserError, before any image is read, if the halves cannot be evaluated.
        rows: runs the evaluation; raises the errors of ``Halves.features`` and of ``check``.
        choice: the features that a spec chooses for the protocol.
        pixels: whether reports compare the features with raw pixels.
    """

    summary: str
    row: type[Evaluation]
    check: Callable[[Halves], None]
    rows: Callable[[Halves, Subject], Sequence[Evaluation]]
    choice: Callable[[EvaluateSpec], Choice]
    pixels: bool = True


def _common(settings: EvaluateSpec) -> Choice:
    return Choice(settings.branch, settings.tokens)


def _lowshot(settings: EvaluateSpec) -> Choice:
    own = settings.lowshot
    tokens = own.tokens or settings.tokens
    return Choice(settings.branch, tokens, own.final_norm, own.blocks, own.interpolation)


def _labelled(halves: Halves) -> None:
    require_classes(halves, "low-shot")


PROTOCOLS = {
    "knn": FeatureProtocol("weighted nearest neighbours", knn.KnnRow, knn.check, knn.rows, _common),
    "probe": FeatureProtocol(
        "a quick linear probe on features that are computed once",
        probe.ProbeRow,
        probe.check,
        probe.rows,
        _common,
    ),
    "rank": FeatureProtocol(
        "effective rank of the features: RankMe and LiDAR",
        rank.RankRow,
        rank.check,
        rank.rows,
        _common,
        pixels=False,
    ),
    "lowshot": FeatureProtocol(
        "logistic regression on few labelled images",
        lowshot.LowshotRow,
        _labelled,
        lowshot.rows,
        _lowshot,
    ),
}
"""Name -> protocol. A row has the name under "eval", and ``tools/eval.py`` takes it."""
ROWS: dict[str, type[Evaluation]] = {
    **{name: protocol.row for name, protocol in PROTOCOLS.items()},
    **dict.fromkeys(classifier.TITLES, classifier.ClassifierRow),
}
"""Value under "eval" -> model of such a row."""
