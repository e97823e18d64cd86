"""The executable specification: a backend in float64 NumPy, differentiated by ``autograd``.

It is slow and plain on purpose. Where backends disagree, this one decides.
"""

from collections.abc import Mapping

import numpy as np

from triptych.core.config.spec import RunSpec
from triptych.core.contracts import ALONE, Array, Ranks
from triptych.core.reference.engine import Engine


def versions() -> dict[str, str]:
    """Versions that can change a number."""
    return {"numpy": np.__version__}


def compute(spec: RunSpec) -> dict[str, str]:
    """The device of the run. Like ``versions``, it can change a number."""
    return {"device": "cpu"}


def build(spec: RunSpec, state: Mapping[str, Array], ranks: Ranks = ALONE) -> Engine:
    """An engine that holds ``state``. It computes in float64, whatever the spec's precision."""
    return Engine(spec, state, ranks)
