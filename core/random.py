"""Named, counter-based random streams: the only source of randomness in a run.

A draw is a pure function of (seed, stream name, counters). It depends on no framework, on no number
of workers or ranks, and on no earlier draw. Arithmetic never mixes counters into the seed, since
such seeds collide (``seed * epoch`` is 0 for every seed at epoch 0).
"""

import hashlib
from functools import lru_cache
from typing import cast

import numpy as np
from numpy.random.bit_generator import ISeedSequence, SeedSequence
from numpy.typing import DTypeLike, NDArray


class _Key(ISeedSequence):
    """A key for Philox. Given as ``key``, NumPy would draw a seed from the system before."""

    def __init__(self, key: NDArray[np.uint64]) -> None:
        self._key = key

    def generate_state(self, n_words: int, dtype: DTypeLike = np.uint64) -> NDArray[np.uint64]:
        """The two words of the key."""
        return self._key


def stream(seed: int, name: str, *counters: int) -> np.random.Generator:
    """The random generator of a stream at given counters.

    Args:
        seed: seed of the run, 0 <= seed < 2**64.
        name: stream name, e.g. ``"order"`` or ``"init/student.encoder.cls_token"``.
        counters: up to three non-negative integers, e.g. (epoch, sample index, view).

    Raises:
        ValueError: more than three counters, or one that is negative.
    """
    if len(counters) > 3 or min(counters, default=0) < 0:
        raise ValueError(f"stream {name!r}: expected at most 3 counters >= 0, got {counters}")
    # Philox advances word 0 of its counter while it draws numbers.
    counter = np.array([0, *counters, *[0] * (3 - len(counters))], np.uint64)
    return np.random.Generator(np.random.Philox(cast(SeedSequence, _key(seed, name)), counter))


@lru_cache(maxsize=64)
def _key(seed: int, name: str) -> _Key:
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return _Key(np.array([seed, int.from_bytes(digest, "little")], np.uint64))


def check_order(name: str, order: NDArray[np.int64]) -> None:
    """Checks that each row of ``order`` is a permutation of 0 ... n - 1.

    Args:
        name: of the array, for the error.
        order: (n,) or (rows, n), integers.

    Raises:
        ValueError: a row is not a permutation.
    """
    if (np.sort(order, axis=-1) != np.arange(order.shape[-1])).any():
        raise ValueError(f"{name}: expected each of 0 ... {order.shape[-1] - 1} once")
