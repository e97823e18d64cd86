"""Copies of several tensors at once."""

import threading
from dataclasses import replace

import numpy as np
import pytest

from triptych.core.files import copying
from triptych.core.files.copying import copied, copies, verified
from triptych.core.files.tree import Malformed, Stored


def stored(value):
    return Stored.of(np.full(3, value))


def test_copies_come_in_order_with_memory_of_their_own():
    tensors = [(str(i), stored(i)) for i in range(20)]
    found = list(copies(tensors))
    assert [name for name, _ in found] == [name for name, _ in tensors]
    for (_, copy), (_, tensor) in zip(found, tensors, strict=True):
        assert np.array_equal(copy, tensor.bits()) and not np.shares_memory(copy, tensor.bits())


def test_a_checksum_that_differs_is_raised_for_the_first_such_tensor():
    def broken(name):
        def verify():
            raise Malformed(name)

        return replace(stored(0), verify=verify)

    tensors = [("a", stored(1)), ("b", broken("b")), ("c", broken("c"))]
    with pytest.raises(Malformed, match=r"^b$"):
        dict(copies(tensors, verified))
    assert len(dict(copies(tensors, copied))) == 3


def test_two_tensors_are_copied_at_once_and_few_copies_wait(monkeypatch):
    monkeypatch.setattr(copying, "cores", lambda: 2)
    together, made = threading.Barrier(2, timeout=20), []

    def copy(tensor):
        together.wait()  # fails unless another thread copies, too
        made.append(tensor)
        return copied(tensor)

    running = copies([(str(i), stored(i)) for i in range(8)], copy)
    for taken, _ in enumerate(running, 1):
        assert len(made) <= taken + 2
