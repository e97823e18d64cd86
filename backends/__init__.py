"""Finds and imports backends by name. A framework is imported only when its backend is loaded."""

import importlib
import importlib.util
from types import ModuleType

from triptych.core.errors import UserError
from triptych.core.machine.devices import prepare_libraries
from triptych.core.machine.environment import NAMES, install_command, why_not
from triptych.core.machine.interrupts import interrupts_kept

BACKENDS = NAMES
PARALLEL: dict[str, tuple[str, ...]] = {
    "torch": ("data", "tensor", "pipeline", "micro_batches", "shard_optimizer", "recompute"),
    "oneflow": ("data", "tensor", "pipeline", "micro_batches", "shard_optimizer", "recompute"),
    "paddle": ("data", "tensor", "pipeline", "micro_batches", "shard_optimizer", "recompute"),
}
"""Backend -> the keys of the section ``parallel`` that it implements."""
EXPORTERS = {
    "torch": ("onnx", ("onnx", "onnxscript")),
    "paddle": ("onnx-paddle", ("paddle2onnx",)),
}
"""Backend -> the extra with its exporter's packages, and these packages.

OneFlow has none that works: oneflow_onnx 0.6.2 fails on the graphs of OneFlow 0.9.0.
"""


def installed() -> tuple[str, ...]:
    """The backends whose framework is installed. No framework is imported."""
    return tuple(name for name in BACKENDS if importlib.util.find_spec(name) is not None)


def check(name: str) -> None:
    """Raises UserError if a backend does not exist or its framework is not installed."""
    if name not in BACKENDS:
        raise UserError(f"backend {name!r}: expected one of {', '.join(BACKENDS)}")
    if name not in installed():
        raise UserError(
            f"backend {name!r}: its framework is not installed; "
            f"{why_not(name) or 'run: ' + install_command(name)}"
        )


def load(name: str) -> ModuleType:
    """Imports a backend's package, and with it the framework.

    Returns:
        A module with these functions:
            ``join(spec) -> Ranks``: the processes that its launcher has started, several.
            ``build(spec, state, ranks) -> Engine``: an engine that holds the state.
            ``versions() -> dict[str, str]``: package -> version, and settings by name.
            ``compute(spec) -> dict[str, str]``: device, libraries and settings of a run.
            ``cuda_devices() -> int``: number of CUDA devices that the framework sees.
            ``cuda_code() -> tuple[str, ...]``: GPU architectures of the framework's build.

    Raises:
        UserError: the backend does not exist, or its framework is missing or does not import.
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


def exporter(name: str) -> ModuleType:
    """The module that writes a backend's networks as ONNX, by its framework's own exporter.

    Returns:
        A module with the function ``write`` of ``triptych.backends.torch.export``.

    Raises:
        UserError: the framework has no exporter that works, or a package is not installed.
    """
    if name not in EXPORTERS:
        raise UserError(
            f"export: {name} has no exporter that works; open the same weights with backend "
            f"{' or '.join(EXPORTERS)}, which compute the same"
        )
    extra, packages = EXPORTERS[name]
    if missing := [each for each in packages if importlib.util.find_spec(each) is None]:
        raise UserError(
            f"export: {' and '.join(missing)} not installed; run: pip install 'triptych[{extra}]'"
        )
    load(name)
    return importlib.import_module(f"triptych.backends.{name}.export")
