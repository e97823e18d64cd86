"""Fixtures: a backend is a parameter; one that was asked for and is missing fails.

``TRIPTYCH_BACKENDS`` names the backends under test, e.g. ``torch,paddle``, or ``none``. Without it
those that are installed run, and the head of the report says which are left out.
``TRIPTYCH_DEVICE`` names the device under test, e.g. ``cuda``; without it the CPU, also where there
is a GPU.
"""

import gc
import os

# Before any framework is imported: threads of several frameworks on few cores make slow tests.
for _variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_variable, "2")
os.environ.setdefault("TRIPTYCH_DEVICE", "cpu")

from triptych.core.machine.blas import choose_kernels

choose_kernels()  # before NumPy is imported

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from support import crashes

from triptych import backends
from triptych.core.machine.launchers import COMMON, PADDLE

# Relative errors, max|a-b| / max|b| per tensor, that must hold in a single process.
TOLERANCE = {
    "float64": {
        "op": 1e-12,  # each operation and module, forward and gradient, against NumPy
        "features": 1e-10,  # whole-model features and loss
        "gradient": 1e-8,  # every tensor that is not rounding noise
        "state": 1e-8,  # after three optimizer steps against the golden numbers
        "curve": 1e-10,  # 100 steps of a digits recipe, any two backends
        "parallel": 1e-8,  # data, tensor or pipeline parallel against one process
    },
    "float32": {"op": 1e-5, "features": 1e-5, "parallel": 1e-4},
}


def relative_error(actual: Any, expected: Any) -> float:
    """max|a-b| / max|b|; 0 for equal arrays, zeros included; inf where either is not finite."""
    a, b = np.asarray(actual), np.asarray(expected)
    if a.shape != b.shape:
        raise AssertionError(f"shapes differ: {a.shape} and {b.shape}")
    a, b = a.astype(np.float64), b.astype(np.float64)
    if np.array_equal(a, b):
        return 0.0
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return float("inf")
    scale = np.abs(b).max()
    return float(np.abs(a - b).max() / scale) if scale else float("inf")


def assert_close(actual: Any, expected: Any, relative: float, name: str = "value") -> None:
    """Fails unless the relative error is at most ``relative``."""
    error = relative_error(actual, expected)
    if not error <= relative:
        raise AssertionError(f"{name}: relative error {error:.3e} > {relative:.0e}")


def requested() -> tuple[str, ...] | None:
    """Backends named by TRIPTYCH_BACKENDS, which must then be there; None: those installed."""
    names = [n for n in os.environ.get("TRIPTYCH_BACKENDS", "").replace(",", " ").split()]
    if not names:
        return None
    return tuple(name for name in names if name != "none")


def under_test() -> tuple[str, ...]:
    """The backends that are tested: those requested, or else those installed."""
    names = requested()
    return backends.installed() if names is None else names


def pytest_configure(config: pytest.Config) -> None:
    """Takes care of crashes, and raises UsageError for a name that is no backend.

    Such a name would otherwise test nothing.
    """
    unknown = set(requested() or ()) - set(backends.BACKENDS)
    if unknown:
        raise pytest.UsageError(
            f"TRIPTYCH_BACKENDS: unknown {', '.join(sorted(unknown))}; "
            f"expected some of {', '.join(backends.BACKENDS)}, or none"
        )
    config.pluginmanager.register(crashes)


def pytest_report_header(config: pytest.Config) -> str:
    """Says which backends are tested and which are left out: nothing is skipped in silence."""
    tested = under_test()
    left_out = [name for name in backends.BACKENDS if name not in tested]
    return (
        f"backends: {', '.join(tested) or 'none'}; left out: {', '.join(left_out) or 'none'}; "
        f"device: {os.environ['TRIPTYCH_DEVICE']}"
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes ``backend_name`` or ``backend`` runs once per backend."""
    if "backend_name" in metafunc.fixturenames:
        metafunc.parametrize("backend_name", backends.BACKENDS, scope="session")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leaves tests marked ``one_backend`` to ``make soak`` on every backend but the first one.

    The hook comes before pytest's own, which selects by marker.
    """
    names = requested()
    under_test = backends.installed() if names is None else names
    others = [name for name in backends.BACKENDS if name in under_test][1:]
    for item in items:
        name = item.callspec.params.get("backend_name") if hasattr(item, "callspec") else None
        if name in others and item.get_closest_marker("one_backend"):
            item.add_marker(pytest.mark.soak)


@pytest.fixture(autouse=True)
def without_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """Removes the variables of launchers, some of which OneFlow sets when it is imported."""
    for variables in (COMMON, PADDLE):
        for name in (*variables[1:-1], *variables.others):
            monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def backend(backend_name: str) -> ModuleType:
    """The backend package; one that was requested and is missing fails with UserError."""
    names = requested()
    if names is not None and backend_name not in names:
        pytest.skip(f"{backend_name} not requested by TRIPTYCH_BACKENDS")
    if names is None and backend_name not in backends.installed():
        pytest.skip(f"{backend_name} is not installed")
    package = backends.load(backend_name)
    # A framework has many objects that live as long as the process. Python's search for
    # unused objects need not look at them.
    gc.freeze()
    return package


@pytest.fixture
def numpy_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every run of a test is on the NumPy engine."""
    from support import double

    double.install(monkeypatch)


@pytest.fixture
def whole(numpy_backend: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an undisturbed run on the NumPy engine."""
    from support import double

    return double.finished(double.tiny(), tmp_path_factory.mktemp("whole"))
