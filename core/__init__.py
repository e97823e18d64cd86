"""Everything that makes two runs differ, decided with NumPy before a framework sees it."""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from triptych.core.api import get_model, inference_model, list_models
else:

    def __getattr__(name: str) -> Any:
        """The Python interface, imported when it is first asked for: it needs everything else."""
        if name in __all__:
            return getattr(importlib.import_module("triptych.core.api"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["get_model", "inference_model", "list_models"]
