"""What the tests of Paddle's own traps share."""

from types import ModuleType

import numpy as np
import pytest
from conftest import requested
from support.native import lively_state, tiny_spec

from triptych import backends


def framework() -> ModuleType:
    """Paddle, loaded by the backend; missing although requested, the test fails."""
    names = requested()
    if "paddle" not in (backends.installed() if names is None else names):
        pytest.skip("paddle is not installed, or not requested by TRIPTYCH_BACKENDS")
    backends.load("paddle")
    import paddle

    return paddle


def build(precision="float64", change=None, case="moco_v3_vit", **sections):
    """An engine in a lively state, of which ``change`` replaces some tensors."""
    spec = tiny_spec(precision, case, **sections)
    return backends.load("paddle").build(spec, {**lively_state(spec), **(change or {})})


def normalized(x, axis, epsilon):
    """Without mean, of variance 1; in more digits than float64."""
    x = x.astype(np.longdouble)
    centred = x - x.mean(axis, keepdims=True)
    return centred / np.sqrt(np.square(centred).mean(axis, keepdims=True) + np.longdouble(epsilon))
