"""The executable specification: everything in float64 NumPy, differentiated by ``autograd``.

Slow and plain on purpose. Where backends disagree, this decides.
"""

from collections.abc import Mapping

import numpy as np

from triptych.core.config.spec import RunSpec
from triptych.core.contracts import Array
from triptych.core.reference.engine import Engine


def versions() -> dict[str, str]:
    """Versions that can change a number."""
    return {"numpy": np.__version__}


def compute(spec: RunSpec) -> dict[str, str]:
    """What a run computes on: what can change a number, besides ``versions``."""
    return {"device": "cpu"}


def build(spec: RunSpec, state: Mapping[str, Array]) -> Engine:
    """An engine in float64, whatever the spec's precision, that holds ``state``."""
    return Engine(spec, state)
