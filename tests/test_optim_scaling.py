"""The scale of the loss in float16: when it moves, and what of it is state."""

import numpy as np
import pytest

from triptych.core.errors import NonFiniteError
from triptych.core.optim import scaling
from triptych.core.optim.scaling import LossScale


def test_the_scale_grows_after_many_updates_and_falls_after_one_left_out():
    scale = LossScale()
    for _ in range(1999):
        scale.update(finite=True)
    assert (scale.scale, scale.good_steps, scale.skipped) == (65536, 1999, 0)
    scale.update(finite=True)
    assert (scale.scale, scale.good_steps, scale.skipped) == (131072, 0, 0)
    scale.update(finite=True)
    scale.update(finite=False)
    assert (scale.scale, scale.good_steps, scale.skipped) == (65536, 0, 1)


def test_the_scale_has_bounds():
    scale = LossScale(scale=2**32, good_steps=1999)
    scale.update(finite=True)
    assert scale.scale == 2**32
    scale = LossScale(scale=2)
    scale.update(finite=False)
    with pytest.raises(NonFiniteError, match="use precision=bfloat16 or float32"):
        scale.update(finite=False)
    assert (scale.scale, scale.skipped) == (1, 1)


def test_its_state_is_whole():
    scale, other = LossScale(512, 7, 3), LossScale()
    for name, slot in scale.slots().items():
        other.slots()[name].write(slot.read())
    assert other == scale


def test_a_state_from_elsewhere_gets_what_its_precision_has():
    scale, step = {"optimizer.scale": np.array(512)}, {"optimizer.step": np.array(5)}
    fresh = {"optimizer.good_steps": 0, "optimizer.skipped": 0}
    assert scaling.fitted({**step, **scale}, "float16") == {**step, **scale, **fresh}
    assert scaling.fitted(step, "float16") == {**step, "optimizer.scale": 65536, **fresh}
    assert scaling.fitted({**step, **scale}, "bfloat16") == step


def test_the_steps_behind_a_state_count_what_was_left_out():
    state = {"optimizer.step": np.array(5), "optimizer.skipped": np.array(2)}
    assert scaling.steps_behind(state) == 7
    assert scaling.steps_behind({}) == 0
