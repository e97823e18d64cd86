"""Everything that makes two runs differ, decided with NumPy before a framework sees it."""

import importlib
from typing import TYPE_CHECKING, Any

from triptych.core.machine.blas import choose_kernels

__version__ = "0.1.0"

if TYPE_CHECKING:
    from triptych.core.api import get_model, inference_model, list_models
    from triptych.core.sharing import export, model_card, push
else:

    def __getattr__(name: str) -> Any:
        """The Python interface, imported when it is first asked for: it needs everything else."""
        if name in __all__:
            choose_kernels()
            room = "sharing" if name in SHARING else "api"
            return getattr(importlib.import_module(f"triptych.core.{room}"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


SHARING = ("export", "model_card", "push")
"""Names that the room ``sharing`` gives; the others come from ``api``."""
__all__ = ["export", "get_model", "inference_model", "list_models", "model_card", "push"]
