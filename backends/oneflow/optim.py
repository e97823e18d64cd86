"""Optimizers of named parameters. The tensors of their state have canonical names."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import oneflow as flow
from oneflow import Tensor, nn

from triptych.backends.oneflow import flat, kernels
from triptych.backends.oneflow.owned import Owned, Piece
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
        owned: which part of the buffer this process updates; None: all.
    """

    spec: OptimSpec
    """The section ``optim``; a subclass names that of its rule."""
    kinds: tuple[str, ...]
    """The kinds of moments, e.g. "exp_avg"."""
    numpy_serves = False
    """Whether ``_update`` gets arrays instead of tensors on the CPU in float32."""

    def __init__(
        self,
        named: Mapping[str, nn.Parameter],
        values: Tensor,
        spec: OptimSpec,
        members: Mapping[str, groups.Group],
        norms: Norms = WHOLE_NORMS,
        owned: Owned | None = None,
    ) -> None:
        self.named, self.norms, self.owned = dict(named), norms, owned
        self.spec, self.clip_norm = spec, spec.clip_norm
        self.count = 0
        self._values = values
        self._gradients = flow.zeros_like(values)
        part = slice(0, values.numel()) if owned is None else owned.part
        own = values[part], self._gradients[part]
        self._moments = [flow.zeros_like(own[0]) for _ in self.kinds]
        operands = [*own, *self._moments]
        self._waits = self.numpy_serves and values.dtype == flow.float32 and not values.is_cuda
        if self._waits:
            operands = [x.numpy() for x in operands]
        self._blocks = [
            (group, block)
            for group, run in _runs(self.named, members, part)
            for block in zip(*(flat.blocks(x[run]) for x in operands), strict=True)
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
        if self._waits:
            # OneFlow must not read values late, which NumPy changes at once.
            flow._oneflow_internal.eager.Sync()
        for group, block in self._blocks:
            self._update(*groups.rates(group, self.spec, hyper), *block)
        if self.owned:
            self.owned.share()

    def zero_grad(self) -> None:
        """Clears the gradients."""
        self._gradients.zero_()

    @flow.no_grad()
    def sum_gradients(self, group: Group) -> None:
        """Replaces the gradients by their sums over the group, at least those that it owns."""
        if self.owned:
            self.owned.sum(self._gradients)
            return
        for part in flat.blocks(self._gradients):
            part.copy_(group.sum(part))

    def gradient_norm(self) -> Tensor:
        """The global L2 norm of the current gradients."""
        if not self.norms.whole:
            return self.norms.total(self._own(self._gradients))
        # flow.linalg.norm is 2 % too small for twenty million float32 values.
        return flow.stack([(g * g).sum() for g in flat.blocks(self._gradients)]).sum().sqrt()

    def moments(self, kind: str) -> dict[str, Tensor]:
        """Canonical name of a parameter -> its moment of this kind."""
        return flat.split(self._moments[self.kinds.index(kind)], self.named)

    def owned_moments(self, kind: str, owned: Owned) -> dict[str, Piece]:
        """Likewise: what this process has of the moment, if it owns a part."""
        return owned.pieces(self._moments[self.kinds.index(kind)], self.named)

    def owned_gradients(self, owned: Owned) -> dict[str, Piece]:
        """Canonical name -> what this process has of the summed gradient."""
        return owned.pieces(self._gradients[owned.part], self.named)

    def _own(self, buffer: Tensor) -> dict[str, Tensor]:
        """What this process updates of each packed tensor; a zero stands for nothing."""
        if self.owned is None:
            return flat.split(buffer, self.named)
        pieces = self.owned.pieces(buffer[self.owned.part], self.named)
        nothing = buffer.new_zeros((1,))
        return {n: nothing if p.values is None else p.values for n, p in pieces.items()}

    def _prepare(self, hyper: Hyper) -> None:  # noqa: B027 - most rules need no whole tensors
        """Changes the gradients before the update. Here, unlike in a block, tensors are whole."""

    @abstractmethod
    def _update(
        self, lr: float, decay: float, value: Tensor, gradient: Tensor, *moments: Tensor
    ) -> None:
        """Updates a block of values in place with the rates of its group."""


def _runs(
    named: Mapping[str, nn.Parameter], members: Mapping[str, groups.Group], part: slice
) -> list[tuple[groups.Group, slice]]:
    """The contiguous parts of the packed parameters that belong to one group.

    Args:
        part: of the buffer. Only what is in it counts, from its start.
    """
    runs: list[tuple[groups.Group, slice]] = []
    start = 0
    for name, parameter in named.items():
        group, stop = members[name], start + parameter.numel()
        if runs and runs[-1][0] == group:
            runs[-1] = group, slice(runs[-1][1].start, stop)
        else:
            runs.append((group, slice(start, stop)))
        start = stop
    cut = [(g, max(run.start, part.start), min(run.stop, part.stop)) for g, run in runs]
    return [(g, slice(a - part.start, b - part.start)) for g, a, b in cut if a < b]


class AdamW(Optimizer):
    """AdamW (see ``core.reference.optim.adamw``)."""

    kinds = ("exp_avg", "exp_avg_sq")
    numpy_serves = True
    spec: AdamWSpec

    def _update(self, lr: float, decay: float, value: Any, gradient: Any, *moments: Any) -> None:
        (beta1, beta2), (exp_avg, exp_avg_sq) = self.spec.betas, moments
        if self._waits:
            kernels.adamw(
                value,
                gradient,
                *moments,
                keep=1.0 - lr * decay,
                betas=self.spec.betas,
                rate=lr / (1.0 - beta1**self.count),
                correction=math.sqrt(1.0 - beta2**self.count),
                eps=self.spec.eps,
            )
            return
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
        owned: Owned | None = None,
    ) -> None:
        super().__init__(named, values, spec, members, norms, owned)
        self._members = members
        self._scaled = self._matrices(values)

    def _prepare(self, hyper: Hyper) -> None:
        """Decays and scales the gradients of tensors of more than one dimension."""
        if not self._scaled:  # a stage of a pipeline may train nothing
            return
        decays = [groups.rates(self._members[n], self.spec, hyper)[1] for n in self._scaled]
        gradients = self._matrices(self._gradients)
        ratios = self._decay(decays, gradients)
        for gradient, ratio in zip(gradients.values(), ratios.split(1), strict=True):
            gradient.mul_(ratio)

    def _matrices(self, buffer: Tensor) -> dict[str, Tensor]:
        return {n: x for n, x in self._own(buffer).items() if self.named[n].ndim > 1}

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
