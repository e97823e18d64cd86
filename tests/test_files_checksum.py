"""Checksums of states."""

import numpy as np

from triptych.core.files.checksum import state_digest


def test_the_digest_of_a_state_is_that_of_its_names_and_values():
    state = {"a": np.arange(6.0).reshape(2, 3), "b": np.array(3), "c": np.zeros((0, 2))}
    digest = state_digest(state)
    assert state_digest({name: array.copy("F") for name, array in state.items()}) == digest
    for name, array in (("a", state["a"] + 1e-9), ("b", np.array(4)), ("d", np.zeros(1))):
        assert state_digest({**state, name: array}) != digest
