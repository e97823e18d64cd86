"""The update rules in NumPy. Each updates one tensor in place."""

from collections.abc import Callable, Mapping

import numpy as np

from triptych.core.config.spec import AdamWSpec, AnyOptimSpec, SgdSpec
from triptych.core.contracts import Array, Hyper, State
from triptych.core.optim.groups import Group, rates
from triptych.core.optim.lars import TRUST_EPSILON


def adamw(
    value: Array,
    gradient: Array,
    exp_avg: Array,
    exp_avg_sq: Array,
    *,
    count: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """AdamW (arXiv 1711.05101, algorithm 2). As in PyTorch, the learning rate scales the decay.

    Args:
        value: parameter, changed in place.
        gradient: of the parameter.
        exp_avg: first moment, changed in place.
        exp_avg_sq: second moment, changed in place.
        count: number of updates including this one, from 1.
        lr: learning rate.
        betas: decay rates of the two moments.
        eps: added to the root of the second moment.
        weight_decay: factor on the parameter, before the learning rate.
    """
    exp_avg += (1.0 - betas[0]) * (gradient - exp_avg)
    exp_avg_sq += (1.0 - betas[1]) * (gradient * gradient - exp_avg_sq)
    mean = exp_avg / (1.0 - betas[0] ** count)
    scale = np.sqrt(exp_avg_sq / (1.0 - betas[1] ** count)) + eps
    value *= 1.0 - lr * weight_decay
    value -= lr * mean / scale


def sgd(
    value: Array,
    gradient: Array,
    momentum_buffer: Array,
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
) -> None:
    """Momentum SGD as in MoCo v1 and v2.

    The weight decay is added to the gradient. The learning rate does not enter the buffer.
    """
    momentum_buffer *= momentum
    momentum_buffer += gradient + weight_decay * value
    value -= lr * momentum_buffer


def lars(
    value: Array,
    gradient: Array,
    momentum_buffer: Array,
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    trust_coefficient: float,
) -> None:
    """LARS (arXiv 1708.03888) as in MoCo v3.

    The learning rate does not enter the buffer, and the trust ratio has no epsilon. Tensors of at
    most one dimension follow plain momentum SGD without weight decay.
    """
    if value.ndim > 1:
        gradient = gradient + weight_decay * value
        norms = float(np.linalg.norm(value)), float(np.linalg.norm(gradient))
        ratio = trust_coefficient * norms[0] / norms[1] if all(norms) else 1.0
        gradient = ratio * gradient
    momentum_buffer *= momentum
    momentum_buffer += gradient
    value -= lr * momentum_buffer


def mmpretrain_lars(
    value: Array,
    gradient: Array,
    momentum_buffer: Array,
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    trust_coefficient: float,
) -> None:
    """LARS as in mmpretrain. Its buffer holds the learning rate of each step.

    The trust ratio has the norm of the gradient without weight decay, and an epsilon.
    """
    if value.ndim > 1:
        size, slope = float(np.linalg.norm(value)), float(np.linalg.norm(gradient))
        ratio = trust_coefficient * size / (slope + weight_decay * size + TRUST_EPSILON)
        gradient = ratio * (gradient + weight_decay * value)
    momentum_buffer *= momentum
    momentum_buffer += lr * gradient
    value -= momentum_buffer


def clip_coefficient(gradients: list[Array], max_norm: float) -> float:
    """The factor that clips the global L2 norm of all gradients.

    It is min(1, max_norm / (norm + 1e-6)).
    """
    norm = np.sqrt(sum(float(np.sum(g * g)) for g in gradients))
    return min(1.0, max_norm / (float(norm) + 1e-6))


class Optimizer:
    """Implements ``core.contracts.Optimizer`` with the update rule that the spec names.

    Args:
        spec: section ``optim``.
        values: all tensors by name. The trainable ones change in place.
        gradients: returns the gradients of the step by name.
        members: the group of each trainable tensor.
    """

    def __init__(
        self,
        spec: AnyOptimSpec,
        values: Mapping[str, Array],
        gradients: Callable[[], State],
        members: Mapping[str, Group],
    ) -> None:
        self.spec, self._values, self._gradients = spec, values, gradients
        self._members = members
        self.count = 0
        kinds = ("exp_avg", "exp_avg_sq") if spec.name == "adamw" else ("momentum_buffer",)
        self.moments = {
            f"optimizer.{kind}.{name}": np.zeros_like(values[name])
            for kind in kinds
            for name in members
        }

    def step(self, hyper: Hyper) -> None:
        """See ``core.contracts.Optimizer``."""
        gradients, factor = self._gradients(), 1.0
        if self.spec.clip_norm is not None:
            factor = clip_coefficient(list(gradients.values()), self.spec.clip_norm)
        self.count += 1
        for name, gradient in gradients.items():
            self._update(name, factor * gradient, hyper)

    def _update(self, name: str, gradient: Array, hyper: Hyper) -> None:
        spec, value = self.spec, self._values[name]
        lr, decay = rates(self._members[name], spec, hyper)
        if isinstance(spec, AdamWSpec):
            adamw(
                value,
                gradient,
                self.moments[f"optimizer.exp_avg.{name}"],
                self.moments[f"optimizer.exp_avg_sq.{name}"],
                count=self.count,
                lr=lr,
                betas=spec.betas,
                eps=spec.eps,
                weight_decay=decay,
            )
            return
        buffer, momentum = self.moments[f"optimizer.momentum_buffer.{name}"], spec.momentum
        if isinstance(spec, SgdSpec):
            sgd(value, gradient, buffer, lr=lr, momentum=momentum, weight_decay=decay)
        else:
            rule = lars if spec.form == "moco_v3" else mmpretrain_lars
            rule(
                value,
                gradient,
                buffer,
                lr=lr,
                momentum=momentum,
                weight_decay=decay,
                trust_coefficient=spec.trust_coefficient,
            )
