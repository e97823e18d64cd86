"""Reads a run directory and checks its content, for tables and reports."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from triptych.core import config
from triptych.core.config.spec import RunSpec
from triptych.core.errors import UserError
from triptych.core.evaluation.row import Evaluation
from triptych.core.runs.rows import Result, Step, evaluation_model, is_known

BASELINES = "baselines.jsonl"
"""File of evaluations of untrained features, in the form of ``metrics.jsonl`` and beside it."""
Entry = TypeVar("Entry", bound=BaseModel)


@dataclass(frozen=True)
class RunRecord:
    """One run.

    Attributes:
        result: None if the run has not reached its last step.
    """

    path: Path
    spec: RunSpec
    steps: Sequence[Step]
    evaluations: Sequence[Evaluation]
    result: Result | None

    @property
    def backend(self) -> str:
        """The backend that finished the run."""
        return self.result.backend if self.result else self.spec.backend or "unknown"

    @property
    def loss(self) -> dict[int, float]:
        """Step -> loss."""
        return {row.step: row.loss for row in self.steps}


def read_run(path: Path) -> RunRecord:
    """Reads a run directory.

    Raises:
        UserError: the folder is no run directory, no step is logged yet, or a file is damaged.
    """
    if not path.is_dir():
        raise UserError(f"{path}: {'not a folder' if path.exists() else 'no such folder'}")
    for name in ("spec.yaml", "metrics.jsonl"):
        if not (path / name).is_file():
            raise UserError(f"{path}: no {name} there, so it is not the folder of a run")
    spec = config.load(path / "spec.yaml")
    steps: list[Step] = []
    evaluations: list[Evaluation] = []
    for name in ("metrics.jsonl", BASELINES):
        for place, text in _lines(path / name):
            row = _object(text, place)
            if not is_known(row):
                continue
            if "eval" in row:
                evaluations.append(_checked(evaluation_model(row), row, place))
            else:
                steps.append(_checked(Step, row, place))
    if not steps:
        raise UserError(f"{path / 'metrics.jsonl'}: no step has been logged yet")
    file = path / "result.json"
    result = None
    if file.exists():
        result = _checked(Result, _object(_text(file), str(file)), str(file))
    return RunRecord(path, spec, steps, evaluations, result)


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """(place, text) of each finished line. The run may still be writing its last line."""
    lines = _text(path).split("\n")[:-1] if path.exists() else []
    yield from ((f"{path}: line {i + 1}", line) for i, line in enumerate(lines) if line.strip())


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text file ({error.reason})") from error
    except OSError as error:
        raise UserError(f"{path}: cannot read: {error.strerror}") from error


def _object(text: str, place: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: damaged: not JSON") from error
    if not isinstance(value, dict):
        raise UserError(f"{place}: damaged: expected a JSON object")
    return value


def _checked(kind: type[Entry], row: dict[str, Any], place: str) -> Entry:
    try:
        return kind.model_validate(row)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "the object"
        raise UserError(f"{place}: {key}: {first['msg']}") from error
