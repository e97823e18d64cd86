"""Parameters of tests, some of them with a mark."""

from collections.abc import Collection
from typing import Any

import pytest


def marked(values: Collection[Any], chosen: Collection[Any], mark: Any) -> list[Any]:
    """Parameters, of which the chosen ones have a mark."""
    assert all(value in values for value in chosen), f"{chosen}: not all among the parameters"
    return [pytest.param(value, marks=mark if value in chosen else ()) for value in values]
