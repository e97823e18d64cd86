"""The methods by ``method.name`` of the spec. Each module here is a ``core.contracts.Method``."""

from typing import Any

from triptych.core.config.spec import FinetuneSpec, LinearSpec, MocaSpec, MocoV3Spec, QueueSpec
from triptych.core.contracts import (
    FinetuneModel,
    LinearModel,
    Method,
    MocaModel,
    Model,
    QueueModel,
)
from triptych.core.methods import finetune, linear, moca, moco, moco_v3

_MOCO: Method[QueueModel, QueueSpec] = moco
_MOCO_V3: Method[Model, MocoV3Spec] = moco_v3
_MOCA: Method[MocaModel, MocaSpec] = moca
_LINEAR: Method[LinearModel, LinearSpec] = linear
_FINETUNE: Method[FinetuneModel, FinetuneSpec] = finetune

METHODS: dict[str, Method[Any, Any]] = {
    "moco_v1": _MOCO,
    "moco_v2": _MOCO,
    "moco_v3": _MOCO_V3,
    "moca": _MOCA,
    "linear": _LINEAR,
    "finetune": _FINETUNE,
}
