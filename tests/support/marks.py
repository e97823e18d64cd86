"""Parameters of tests, some of them with a mark."""

from collections.abc import Container, Iterable
from typing import Any

import pytest


def marked(values: Iterable[Any], chosen: Container[Any], mark: Any) -> list[Any]:
    """Parameters, of which the chosen ones have a mark."""
    return [pytest.param(value, marks=mark if value in chosen else ()) for value in values]
