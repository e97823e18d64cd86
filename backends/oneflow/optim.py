"""Optimizers of named parameters. The tensors of their state have canonical names."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping

import oneflow as flow
from oneflow import Tensor, nn

from triptych.backends.oneflow import flat
from triptych.backends.oneflow.sharded import WHOLE_NORMS, Norms
from triptych.core.config.spec import AdamWSpec, LarsSpec, OptimSpec, SgdSpec
from triptych.core.contracts import Group, Hyper
from triptych.core.optim import groups
from triptych.core.optim.lars import TRUST_EPSILON, buffer_rates


class Optimizer(ABC):
    """Implements ``core.contracts.Optimizer`` on packed tensors. Subclasses are the rules.

    OneFlow's own optimizers round their rates to float32, like all attributes of its kernels.
    Operands of tensor operations are not rounded.

    Args:
        named: canonical name -> trainable parameter.
        values: the buffer of the same parameters in the same order (see ``flat.pack``).
        members: the group of each parameter (see ``core.optim.groups``).
        norms: computes the norms of tensors of which this process may have a part.
    """

    spec: OptimSpec
    """The section ``optim``; a subclass names that of its rule."""
    kinds: tuple[str, ...]
    """The kinds of moments, e.g. "exp_avg"."""

    def __init__(
        self,
        named: Mapping[str, nn.Parameter],
        values: Tensor,
        spec: OptimSpec,
        members: Mapping[str, groups.Group],
        norms: Norms = WHOLE_NORMS,
    ) -> None:
        self.named, self.norms = dict(named), norms
        self.spec, self.clip_norm = spec, spec.clip_norm
        self.count = 0
        self._values = values
        self._gradients = flow.zeros_like(values)
        self._moments = [flow.zeros_like(values) for _ in self.kinds]
        buffers = (values, self._gradients, *self._moments)
        self._blocks = [
            (group, block)
            for group, part in _runs(self.named, members)
            for block in zip(*(flat.blocks(buffer[part]) for buffer in buffers), strict=True)
        ]
        self.gradients = flat.split(self._gradients, self.named)
        for name, view in self.gradients.items():
            # The backward pass adds to an existing gradient in place: it stays in the buffer.
            self.named[name].grad = view

    @flow.no_grad()
    def step(self, hyper: Hyper) -> None:
        """Clips the gradients if the spec has ``clip_norm``, then does one update."""
        if self.clip_norm is not None:
            factor = (self.clip_norm / (self.gradient_norm() + 1e-6)).clamp(max=1.0)
            self._gradients.mul_(factor)
        self.count += 1
        self._prepare(hyper)
        for group, block in self._blocks:
            self._update(*groups.rates(group, self.spec, hyper), *block)

    def zero_grad(self) -> None:
        """Clears the gradients."""
        self._gradients.zero_()

    @flow.no_grad()
    def sum_gradients(self, group: Group) -> None:
        """Replaces the gradients by their sums over the group."""
        for part in flat.blocks(self._gradients):
            part.copy_(group.sum(part))

    def gradient_norm(self) -> Tensor:
        """The global L2 norm of the current gradients."""
        if not self.norms.whole:
            return self.norms.total(self.gradients)
        # flow.linalg.norm is 2 % too small for twenty million float32 values.
        return flow.stack([(g * g).sum() for g in flat.blocks(self._gradients)]).sum().sqrt()

    def moments(self) -> dict[str, Tensor]:
        """Canonical name -> moment."""
        return {
            f"optimizer.{kind}.{name}": view
            for kind, buffer in zip(self.kinds, self._moments, strict=True)
            for name, view in flat.split(buffer, self.named).items()
        }

    def _prepare(self, hyper: Hyper) -> None:  # noqa: B027 - most rules need no whole tensors
        """Changes the gradients before the update. Here, unlike in a block, tensors are whole."""

    @abstractmethod
    def _update(
        self, lr: float, decay: float, value: Tensor, gradient: Tensor, *moments: Tensor
    ) -> None:
        """Updates a block of values in place with the rates of its group."""


def _runs(
    named: Mapping[str, nn.Parameter], members: Mapping[str, groups.Group]
) -> list[tuple[groups.Group, slice]]:
    """The contiguous parts of the packed parameters that belong to one group."""
    runs: list[tuple[groups.Group, slice]] = []
    start = 0
    for name, parameter in named.items():
        group, stop = members[name], start + parameter.numel()
        if runs and runs[-1][0] == group:
            runs[-1] = group, slice(runs[-1][1].start, stop)
        else:
            runs.append((group, slice(start, stop)))
        start = stop
    return runs


class AdamW(Optimizer):
    """AdamW (see ``core.reference.optim.adamw``)."""

    kinds = ("exp_avg", "exp_avg_sq")
    spec: AdamWSpec

    def _update(
        self, lr: float, decay: float, value: Tensor, gradient: Tensor, *moments: Tensor
    ) -> None:
        (beta1, beta2), (exp_avg, exp_avg_sq) = self.spec.betas, moments
        value.mul_(1.0 - lr * decay)
        exp_avg.mul_(beta1).add_(gradient, alpha=1.0 - beta1)
        exp_avg_sq.mul_(beta2).addcmul_(gradient, gradient, value=1.0 - beta2)
        correction = math.sqrt(1.0 - beta2**self.count)
        scale = exp_avg_sq.sqrt().div_(correction).add_(self.spec.eps)
        value.addcdiv_(exp_avg, scale, value=-lr / (1.0 - beta1**self.count))


class Sgd(Optimizer):
    """SGD with momentum. Weight decay is added to the gradient of every tensor."""

    kinds = ("momentum_buffer",)
    spec: SgdSpec

    def _update(
        self, lr: float, decay: float, value: Tensor, gradient: Tensor, *moments: Tensor
    ) -> None:
        (buffer,) = moments
        buffer.mul_(self.spec.momentum).add_(gradient).add_(value, alpha=decay)
        value.add_(buffer, alpha=-lr)


class Lars(Optimizer):
    """LARS (see ``core.reference.optim``)."""

    kinds = ("momentum_buffer",)
    spec: LarsSpec

    def __init__(
        self,
        named: Mapping[str, nn.Parameter],
        values: Tensor,
        spec: LarsSpec,
        members: Mapping[str, groups.Group],
        norms: Norms = WHOLE_NORMS,
    ) -> None:
        super().__init__(named, values, spec, members, norms)
        views = flat.split(values, self.named)
        self._scaled = {n: views[n] for n, parameter in self.named.items() if parameter.ndim > 1}
        self._members = members

    def _prepare(self, hyper: Hyper) -> None:
        """Decays and scales the gradients of tensors of more than one dimension."""
        decays = [groups.rates(self._members[n], self.spec, hyper)[1] for n in self._scaled]
        gradients = {name: self.gradients[name] for name in self._scaled}
        ratios = self._decay(decays, gradients)
        for gradient, ratio in zip(gradients.values(), ratios.split(1), strict=True):
            gradient.mul_(ratio)

    def _decay(self, decays: list[float], gradients: dict[str, Tensor]) -> Tensor:
        """Adds the weight decay to the gradients in place, and returns the trust ratios."""
        norms = self.norms.of(self._scaled)
        trusted = self.spec.trust_coefficient * norms
        if self.spec.form == "mmpretrain":
            shares = flow.tensor(decays, dtype=norms.dtype, device=norms.device)
            ratios = trusted / (self.norms.of(gradients) + shares * norms + TRUST_EPSILON)
        for name, decay in zip(gradients, decays, strict=True):
            gradients[name].add_(self._scaled[name], alpha=decay)
        if self.spec.form == "moco_v3":
            decayed = self.norms.of(gradients)
            usable = (norms > 0) & (decayed > 0)
            ratios = flow.where(usable, trusted / decayed, flow.ones_like(norms))
        return ratios

    def _update(
        self, lr: float, decay: float, value: Tensor, gradient: Tensor, *moments: Tensor
    ) -> None:
        (buffer,), (entering, leaving) = moments, buffer_rates(self.spec, lr)
        buffer.mul_(self.spec.momentum).add_(gradient, alpha=entering)
        value.add_(buffer, alpha=-leaving)


OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {"adamw": AdamW, "sgd": Sgd, "lars": Lars}
