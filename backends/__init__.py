"""The one place that maps a backend's name to its framework, which is imported on demand."""

import importlib
import importlib.util
from types import ModuleType

from triptych.core.errors import UserError
from triptych.core.machine.devices import prepare_libraries
from triptych.core.machine.environment import NAMES, install_command, why_not
from triptych.core.machine.interrupts import interrupts_kept

BACKENDS = NAMES


def installed() -> tuple[str, ...]:
    """Backends whose framework can be found, without importing it."""
    return tuple(name for name in BACKENDS if importlib.util.find_spec(name) is not None)


def check(name: str) -> None:
    """Raises UserError where a backend does not exist or its framework is not installed."""
    if name not in BACKENDS:
        raise UserError(f"backend {name!r}: expected one of {', '.join(BACKENDS)}")
    if name not in installed():
        raise UserError(
            f"backend {name!r}: its framework is not installed; "
            f"{why_not(name) or 'run: ' + install_command(name)}"
        )


def load(name: str) -> ModuleType:
    """The backend package, its framework imported.

    Returns:
        A module with ``build(spec, state) -> Engine``, ``versions() -> dict`` and
        ``cuda_devices() -> int``.

    Raises:
        UserError: no such backend, or its framework is missing or does not import.
        KeyboardInterrupt: Ctrl-C during the import.
    """
    check(name)
    prepare_libraries()
    try:
        with interrupts_kept():
            return importlib.import_module(f"triptych.backends.{name}")
    except (ImportError, OSError) as error:
        raise UserError(
            f"backend {name!r}: its framework does not import ({error}); "
            f"run: {install_command(name)} --force-reinstall"
        ) from error
