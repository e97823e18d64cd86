"""What linear probe and fine-tuning share as methods."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

from triptych.core.config.spec import RunSpec, SupervisedSpec
from triptych.core.contracts import Batch, Step, Targets

FLAT = 0.0
REMEDY = "a supervised run does not collapse"
CHANCE = "the loss is {:.4f} where all classes are equally likely"
LOSSES = 1
WHOLE = False


def chance(spec: RunSpec) -> float:
    """The loss if every class is as likely as any other."""
    return math.log(cast(SupervisedSpec, spec.method).classes)


def settled(spec: RunSpec) -> int:
    """Zero: the loss depends on the features from the first step on."""
    return 0


def judged(values: Mapping[str, float]) -> float:
    """The loss of the step."""
    return values["loss"]


def spread(values: Mapping[str, float]) -> float:
    """The spread of the features (``core.methods.health.feature_std``)."""
    return values["feature_std"]


def status(values: Mapping[str, float]) -> list[str]:
    """The accuracy on the batch, where the step has measured it."""
    return [f"acc1 {values['acc1']:.1f} %"] if "acc1" in values else []


def targets(step: Step[Any, Any], parts: Sequence[Batch]) -> Targets:
    """Nothing: the batch holds the labels."""
    return Targets([{} for _ in parts])
