"""The pieces that the shared parts, a method and a backend hand each other: import them from here.

mypy holds ``core`` and every backend to the protocols (``make lint``).
"""

from triptych.core.contracts.method import (
    Method,
)
from triptych.core.contracts.networks import (
    Codebook,
    Encoder,
    MaskedEncoder,
    Memory,
    MocaModel,
    Model,
    Networks,
    Optimizer,
    QueueModel,
)
from triptych.core.contracts.ops import (
    Ops,
)
from triptych.core.contracts.step import (
    ALONE,
    Array,
    Batch,
    Context,
    Hyper,
    Outcome,
    Ranks,
    Slot,
    State,
    Tensor,
)

__all__ = [
    "ALONE",
    "Array",
    "Batch",
    "Codebook",
    "Context",
    "Encoder",
    "Hyper",
    "MaskedEncoder",
    "Memory",
    "Method",
    "MocaModel",
    "Model",
    "Networks",
    "Ops",
    "Optimizer",
    "Outcome",
    "QueueModel",
    "Ranks",
    "Slot",
    "State",
    "Tensor",
]
