"""Fixtures: a backend is a parameter; a missing one is skipped unless it was asked for."""

import os

# Before any framework is imported: an oversubscribed test is a slow, flaky test.
os.environ.setdefault("OMP_NUM_THREADS", "2")

import pytest

from triptych import backends


def requested() -> tuple[str, ...]:
    """Backends that must be there: TRIPTYCH_BACKENDS="torch,paddle"; default: those installed."""
    names = os.environ.get("TRIPTYCH_BACKENDS", "")
    return tuple(n for n in names.split(",") if n)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend_name" in metafunc.fixturenames:
        metafunc.parametrize("backend_name", backends.BACKENDS)


@pytest.fixture
def backend(backend_name: str):
    """The backend package: installed ones run; one that was requested and is missing fails."""
    if requested() and backend_name not in requested():
        pytest.skip(f"{backend_name} not requested by TRIPTYCH_BACKENDS")
    if not requested() and backend_name not in backends.installed():
        pytest.skip(f"{backend_name} is not installed")
    return backends.load(backend_name)
