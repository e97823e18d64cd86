"""Optimizers bound to named parameters; their state has canonical names."""

import math
from collections.abc import Mapping

import oneflow as flow
from oneflow import Tensor, nn

from triptych.backends.oneflow import flat
from triptych.core.config.spec import OptimSpec
from triptych.core.engine import Hyper


class AdamW:
    """AdamW on packed tensors: decay on every one that has a gradient.

    OneFlow's own rounds learning rate, betas and eps to float32, as every attribute of its
    kernels; operands of tensor operations are exact.

    Args:
        named: canonical name -> trainable parameter.
        values: the same parameters packed, in that order (``flat.pack``).
    """

    def __init__(self, named: Mapping[str, nn.Parameter], values: Tensor, spec: OptimSpec) -> None:
        self.named = dict(named)
        self.betas, self.eps, self.clip_norm = spec.betas, spec.eps, spec.clip_norm
        self.count = 0
        self._values = values
        self._gradients = flow.zeros_like(values)
        self._exp_avg, self._exp_avg_sq = flow.zeros_like(values), flow.zeros_like(values)
        self.gradients = flat.split(self._gradients, self.named)
        for name, view in self.gradients.items():
            # The backward pass adds to a gradient that is there, in place.
            self.named[name].grad = view

    @flow.no_grad()
    def step(self, hyper: Hyper) -> None:
        """Clips where the spec says so, then one update."""
        gradients = self._gradients
        if self.clip_norm is not None:
            gradients.mul_((self.clip_norm / (self.gradient_norm() + 1e-6)).clamp(max=1.0))
        self.count += 1
        beta1, beta2 = self.betas
        self._values.mul_(1.0 - hyper.lr * hyper.weight_decay)
        self._exp_avg.mul_(beta1).add_(gradients, alpha=1.0 - beta1)
        self._exp_avg_sq.mul_(beta2).addcmul_(gradients, gradients, value=1.0 - beta2)
        correction = math.sqrt(1.0 - beta2**self.count)
        scale = self._exp_avg_sq.sqrt().div_(correction).add_(self.eps)
        rate = hyper.lr / (1.0 - beta1**self.count)
        self._values.addcdiv_(self._exp_avg, scale, value=-rate)

    def zero_grad(self) -> None:
        """Forgets the gradients."""
        self._gradients.zero_()

    def gradient_norm(self) -> Tensor:
        """Global L2 norm of the gradients as they stand."""
        # flow.linalg.norm loses 2 % of twenty million float32 values.
        return (self._gradients * self._gradients).sum().sqrt()

    def moments(self) -> dict[str, Tensor]:
        """Canonical name -> moment."""
        return {
            f"optimizer.{kind}.{name}": view
            for kind, buffer in (("exp_avg", self._exp_avg), ("exp_avg_sq", self._exp_avg_sq))
            for name, view in flat.split(buffer, self.named).items()
        }


OPTIMIZERS = {"adamw": AdamW}
