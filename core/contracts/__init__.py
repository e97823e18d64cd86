"""The types that the shared code, the methods and the backends exchange. Import them from here.

mypy checks ``core`` and every backend against the protocols (``make lint``).
"""

from triptych.core.contracts.method import (
    Method,
    Step,
)
from triptych.core.contracts.networks import (
    Classifier,
    Codebook,
    Encoder,
    FinetuneModel,
    LinearModel,
    MaskedEncoder,
    Memory,
    MocaModel,
    Model,
    Networks,
    Optimizer,
    QueueModel,
)
from triptych.core.contracts.ops import (
    Kind,
    Ops,
)
from triptych.core.contracts.step import (
    ALONE,
    Array,
    Batch,
    Changes,
    Context,
    Courier,
    Group,
    Hyper,
    Index,
    Outcome,
    Partners,
    Ranks,
    Replicas,
    Slot,
    State,
    Targets,
    Tensor,
    evenly,
)

__all__ = [
    "ALONE",
    "Array",
    "Batch",
    "Changes",
    "Classifier",
    "Codebook",
    "Context",
    "Courier",
    "Encoder",
    "FinetuneModel",
    "Group",
    "Hyper",
    "Index",
    "Kind",
    "LinearModel",
    "MaskedEncoder",
    "Memory",
    "Method",
    "MocaModel",
    "Model",
    "Networks",
    "Ops",
    "Optimizer",
    "Outcome",
    "Partners",
    "QueueModel",
    "Ranks",
    "Replicas",
    "Slot",
    "State",
    "Step",
    "Targets",
    "Tensor",
    "evenly",
]
