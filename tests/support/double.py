"""A real engine where no framework is needed: the NumPy reference in a backend's place.

As a script it is the command line with that engine: ``python tests/support/double.py train -c …``.
"""

import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from triptych import backends
from triptych.core import config, launch, reference
from triptych.core.cli import main
from triptych.core.config.spec import RunSpec
from triptych.core.training import run

TINY = (
    "data.workers=0",
    "model.image_size=8",
    "model.width=8",
    "model.depth=1",
    "model.heads=2",
    "method.hidden_dim=12",
    "method.output_dim=8",
    "train.batch_size=16",
    "train.steps=12",
    "optim.warmup_steps=2",
    "checkpoint.every=4",
    "log.every=3",
    "log.tensorboard=false",
    "evaluate.every=0",
    "threads=1",
)


def tiny(*overrides: str) -> RunSpec:
    """A digits run of a second."""
    return config.load("moco_v3/digits", [*TINY, *overrides])


class Ahead(reference.Engine):
    """As on an accelerator: the host learns of a step's loss only by reading it."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)
        self.context = replace(self.context, runs_ahead=True)


ahead = SimpleNamespace(build=Ahead, versions=reference.versions, compute=reference.compute)


def load(name: str) -> ModuleType:
    """In the place of ``backends.load``."""
    return reference


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every run of a test is on the reference engine."""
    monkeypatch.setattr(backends, "load", load)
    for variable in launch.THREAD_VARIABLES:
        monkeypatch.setenv(variable, "1")  # and so restored, whatever a run sets


def finished(spec: RunSpec, folder: Path, **options: Any) -> Path:
    """The folder of a run that has reached its end."""
    if run.train(spec, "torch", folder, **options) is not None:
        raise AssertionError("a signal ended the run")
    return folder


def saved(folder: Path) -> list[str]:
    """Names of a run's checkpoints, oldest first."""
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


if __name__ == "__main__":
    backends.load = load
    sys.exit(main())
