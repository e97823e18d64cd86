"""Rows of a small feature file."""

import numpy as np

from triptych.core.files.features import Header

HEADER = Header(("ant", "bee"), {"step": 3}, 4)


def rows(start: int, stop: int) -> dict[str, np.ndarray]:
    """Rows ``start`` … ``stop - 1`` of a table with features of three shapes and types."""
    count = stop - start
    numbers = np.arange(start, stop)
    return {
        "name": np.array([f"é/{number}" for number in numbers]),
        "label": numbers % 3 - 1,
        "held_out": numbers >= 5,
        "final": np.repeat(numbers[:, None], 4, axis=1).astype(np.float32) / 3,
        "layer1": np.arange(count * 6.0).reshape(count, 3, 2) + start,
    }
