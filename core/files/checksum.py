"""Checksums. CRC-32 by the package isal of the extra ``fast`` takes a quarter of zlib's time."""

from collections.abc import Mapping

import numpy as np

from triptych.core.contracts import Array

try:
    from isal.isal_zlib import crc32
except ImportError:
    from zlib import crc32

__all__ = ["crc32", "state_digest"]


def state_digest(state: Mapping[str, Array]) -> str:
    """A checksum of names and values, which differs where processes have read different files."""
    total = 0
    for name, array in state.items():
        values = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        total = crc32(values.data, crc32(name.encode(), total))
    return f"{total:08x}"
