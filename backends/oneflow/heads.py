"""Builds projectors and predictors from their plans in ``core.parameters``."""

from collections.abc import Callable

from oneflow import nn

from triptych.backends.oneflow.layers import BatchNorm
from triptych.backends.oneflow.products import Linear
from triptych.core.parameters import Head


def head(plan: Head) -> nn.Sequential:
    """Builds the layers of a plan. (N, width of the input) -> (N, width of the last layer)."""
    return nn.Sequential(*(_LAYERS[kind](fan_in, out) for kind, fan_in, out in plan.layers))


_LAYERS: dict[str, Callable[[int, int], nn.Module]] = {
    "linear": lambda fan_in, out: Linear(fan_in, out, bias=False),
    "biased": Linear,
    "norm": lambda _, out: BatchNorm(out),
    "plain_norm": lambda _, out: BatchNorm(out, affine=False),
    "relu": lambda *_: nn.ReLU(),
}
