"""What is shared of a model: its spec, its tensors, and the record of its run."""

from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from triptych.core import formats
from triptych.core.api import Encoder
from triptych.core.config.spec import RunSpec
from triptych.core.contracts import State
from triptych.core.errors import UserError
from triptych.core.formats.loading import OPTIONAL
from triptych.core.runs.record import RunRecord, read_run

LOG = "metrics.jsonl"
"""A file that the folder of every run has."""


@dataclass(frozen=True)
class Model:
    """A model that is shared.

    Attributes:
        spec: without local paths.
        weights: as in ``get_model``.
        run: the record of the run that trained it, if ``weights`` is the run's folder.
    """

    spec: RunSpec
    weights: Path | None
    run: RunRecord | None

    def state(self) -> State:
        """The canonical tensors without the optimizer's.

        Raises:
            UserError: there are no weights, or they do not fit the spec.
        """
        if self.weights is None:
            raise UserError("push: the encoder has its initial values; give get_model weights")
        state = formats.load_weights(self.weights, self.spec)
        return {name: array for name, array in state.items() if not name.startswith(OPTIONAL)}


def model_of(source: Encoder | str | Path) -> Model:
    """The model of an encoder, or of the folder of a run.

    Raises:
        UserError: the folder is no run, or a file of it is damaged.
    """
    if isinstance(source, Encoder):
        spec, weights = source.spec, source.weights
        run = read_run(weights) if weights and (weights / LOG).is_file() else None
    else:
        weights = Path(source)
        run = read_run(weights)
        spec = run.spec
    return Model(RunSpec.model_validate(_without_paths(spec.model_dump(mode="json"))), weights, run)


def _without_paths(node: Any) -> Any:
    """A tree of JSON in which an absolute path is its last part: it may name a user or a firm."""
    if isinstance(node, dict):
        return {key: _without_paths(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_without_paths(value) for value in node]
    if isinstance(node, str) and (node.startswith("~") or PurePath(node).is_absolute()):
        return PurePath(node).name
    return node
