"""The methods: one module each, found by ``method.name`` of the spec.

Each has ``chance(spec)``; ``settled(spec)``, steps at the start whose loss tells nothing about the
features; ``spread(values)`` of logged metrics, how well images are told apart; ``FLAT``, the spread
below which a loss at chance is a collapse; ``REMEDY``, what helps against one; and the parts of a
step, ``draws(spec, step)``, ``check_draws(spec, draws)`` for draws that come from elsewhere,
``forward(ops, model, views, draws, hyper, method spec)`` and
``finish(model, outcome)``.
"""

from types import ModuleType

from triptych.core.methods import moca, moco, moco_v3

METHODS: dict[str, ModuleType] = {
    "moco_v1": moco,
    "moco_v2": moco,
    "moco_v3": moco_v3,
    "moca": moca,
}
