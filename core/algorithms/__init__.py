"""The methods: one module each, found by ``method.name`` of the spec.

Each has ``chance(spec)``, ``draws(spec, step)``, ``forward(ops, model, views, draws, hyper,
method spec)`` and ``finish(ops, model, outcome, hyper)``.
"""

from types import ModuleType

from triptych.core.algorithms import moca, moco, moco_v3

METHODS: dict[str, ModuleType] = {
    "moco_v1": moco,
    "moco_v2": moco,
    "moco_v3": moco_v3,
    "moca": moca,
}
