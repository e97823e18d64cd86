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


def unverified(tensor):
    return copied(tensor.bits())


@pytest.mark.parametrize(
    "shape", [(), (5,), (1, 600_000), (3, 400_001), (400_001, 3), (1_000_003,)]
)
@pytest.mark.parametrize("dtype", [None, np.float64])
def test_a_copy_has_all_values_in_memory_of_its_own(shape, dtype):
    values = np.arange(np.prod(shape, dtype=int), dtype=np.float32).reshape(shape)
    for source in (values, np.asfortranarray(values), values[::-1] if shape else values):
        copy = copied(source, dtype)
        assert copy.dtype == (dtype or np.float32) and copy.flags.c_contiguous
        assert np.array_equal(copy, source) and not np.shares_memory(copy, source)


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
    assert len(dict(copies(tensors, unverified))) == 3


def test_two_tensors_are_copied_at_once_and_few_copies_wait(monkeypatch):
    monkeypatch.setattr(copying, "cores", lambda: 2)
    together, made = threading.Barrier(2, timeout=20), []

    def copy(tensor):
        together.wait()  # fails unless another thread copies, too
        made.append(tensor)
        return unverified(tensor)

    running = copies([(str(i), stored(i)) for i in range(8)], copy)
    for taken, _ in enumerate(running, 1):
        assert len(made) <= taken + 2
