"""Optimizers bound to named parameters; their state has canonical names."""

import math
from collections.abc import Mapping

import paddle
from paddle import Tensor

from triptych.core.config.spec import OptimSpec
from triptych.core.engine import Hyper

EPSILON = 2.0**-27
"""What is added in place of eps, a power of two: Paddle 2.6 rounds what it adds to float32."""


class AdamW:
    """AdamW: decay on every tensor that has a gradient.

    Paddle's own keeps the decay and the powers of the betas as float32. Only operations in place
    leave a parameter where it is: ``p *= s`` makes a new one that nobody knows.

    Args:
        named: canonical name -> trainable parameter.
    """

    def __init__(self, named: Mapping[str, Tensor], spec: OptimSpec) -> None:
        self.named = dict(named)
        self.betas, self.eps, self.clip_norm = spec.betas, spec.eps, spec.clip_norm
        self.count = 0
        self._exp_avg = {name: paddle.zeros_like(p) for name, p in self.named.items()}
        self._exp_avg_sq = {name: paddle.zeros_like(p) for name, p in self.named.items()}

    @paddle.no_grad()
    def step(self, hyper: Hyper) -> None:
        """Clips where the spec says so, then one update."""
        self._clip()
        self.count += 1
        beta1, beta2 = self.betas
        # m / (sqrt(v) / c + eps), with numerator and denominator times EPSILON / eps.
        factor = EPSILON / self.eps
        rate = factor * hyper.lr / (1.0 - beta1**self.count)
        correction = factor / math.sqrt(1.0 - beta2**self.count)
        for name, parameter in self.named.items():
            gradient = parameter.grad
            if gradient is None:
                continue
            mean, square = self._exp_avg[name], self._exp_avg_sq[name]
            mean.scale_(beta1).add_(gradient * (1.0 - beta1))
            square.scale_(beta2).add_(paddle.square(gradient).scale_(1.0 - beta2))
            size = paddle.sqrt(square).scale_(correction, EPSILON)
            parameter.scale_(1.0 - hyper.lr * hyper.weight_decay).subtract_(mean * rate / size)

    def zero_grad(self) -> None:
        """Forgets the gradients."""
        for parameter in self.named.values():
            parameter.clear_gradient(False)

    def gradient_norm(self) -> Tensor:
        """Global L2 norm of the gradients as they stand."""
        gradients = [p.grad for p in self.named.values() if p.grad is not None]
        # paddle.linalg.norm and paddle.dot lose 1 % of a large float32 tensor.
        return paddle.sqrt(sum(paddle.square(gradient).sum() for gradient in gradients))

    def moments(self) -> dict[str, Tensor]:
        """Canonical name -> moment."""
        return {
            f"optimizer.{kind}.{name}": moments[name]
            for kind, moments in (("exp_avg", self._exp_avg), ("exp_avg_sq", self._exp_avg_sq))
            for name in self.named
        }

    def _clip(self) -> None:
        if self.clip_norm is None:
            return
        scale = self.clip_norm / (float(self.gradient_norm()) + 1e-6)
        if scale < 1.0:
            for parameter in self.named.values():
                if parameter.grad is not None:
                    parameter.grad.scale_(scale)


OPTIMIZERS = {"adamw": AdamW}
