"""The objects of a run directory: logged steps, evaluations and the result."""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, FiniteFloat, PositiveInt, ValidationError

from triptych.core.evaluation import ROWS
from triptych.core.evaluation.row import Evaluation, Share

Row = dict[str, Any]
"""One logged step, or one evaluation, which has the key "eval". The values are plain JSON."""


class Record(BaseModel):
    """A JSON object of a run; unknown keys are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class Step(Record):
    """One logged step.

    Attributes:
        images_per_second: mean since the previous logged step.
        data_wait: share of that time spent waiting for batches.
        evaluate_share: share of the time since the previous logged step that evaluations took.
        skipped: number of damaged files met so far.
        image_warnings: number of files so far that an image library has warned about.
    """

    step: PositiveInt
    loss: FiniteFloat
    chance: FiniteFloat | None = None
    state: str = ""
    feature_std: FiniteFloat | None = None
    gradient_norm: FiniteFloat | None = None
    images_per_second: FiniteFloat | None = None
    data_wait: Share | None = None
    evaluate_share: Share | None = None
    skipped: int = 0
    image_warnings: int = 0


class Result(Record):
    """The content of a finished run's result.json that tables and reports use."""

    backend: str
    versions: dict[str, str] = {}
    device: str = ""
    threads: int | None = None
    seconds: FiniteFloat | None = None
    images_per_second: FiniteFloat | None = None


def evaluation_model(row: Mapping[str, Any]) -> type[Evaluation]:
    """The model of an evaluation row: its protocol's, or ``Evaluation`` if that is unknown."""
    name = row.get("eval")
    return ROWS.get(name, Evaluation) if isinstance(name, str) else Evaluation


def is_known(row: Mapping[str, Any]) -> bool:
    """Whether this version has a model for a row. Every reader passes over the other rows.

    The other rows are evaluations by an unknown protocol that name no step, and objects that have
    nothing of a logged step.
    """
    if "eval" not in row:
        return "step" in row or "loss" in row
    if evaluation_model(row) is not Evaluation:
        return True
    try:
        Evaluation.model_validate(row, strict=True)
    except ValidationError:
        return False
    return True


def evaluation(row: Mapping[str, Any]) -> Evaluation:
    """An evaluation row as its model.

    Raises:
        pydantic.ValidationError: a key of its model is missing or wrong.
    """
    return evaluation_model(row).model_validate(row)
