"""Optimizers of named parameters. The tensors of their state have canonical names."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from triptych.backends.torch.owned import Owned
from triptych.backends.torch.sharded import WHOLE_NORMS, Norms
from triptych.core.config.spec import AdamWSpec, LarsSpec, OptimSpec, SgdSpec
from triptych.core.contracts import Hyper
from triptych.core.optim import groups
from triptych.core.optim.lars import TRUST_EPSILON, buffer_rates


class Optimizer(ABC):
    """Implements ``core.contracts.Optimizer``. Subclasses are the rules.

    Args:
        named: canonical name -> trainable parameter.
        members: the group of each parameter (see ``core.optim.groups``).
        norms: computes the norms of tensors of which this process may have a part.
        owned: which parameters this process updates; None: all.
    """

    count: int
    """Number of updates done."""
    kinds: tuple[str, ...] = ("momentum_buffer",)
    """Names of the moments of a parameter."""

    def __init__(
        self,
        named: Mapping[str, nn.Parameter],
        spec: OptimSpec,
        members: Mapping[str, groups.Group],
        norms: Norms = WHOLE_NORMS,
        owned: Owned | None = None,
    ) -> None:
        self.named, self.norms, self.owned = dict(named), norms, owned
        self.own = {n: p for n, p in named.items() if owned is None or n in owned.names}
        self.spec, self.clip_norm = spec, spec.clip_norm
        self.groups: dict[groups.Group, list[str]] = {members[name]: [] for name in self.named}
        for name in self.own:
            self.groups[members[name]].append(name)

    def step(self, hyper: Hyper) -> None:
        """Clips the gradients if the spec has ``clip_norm``, then does one update."""
        if self.clip_norm is not None:
            norm = self.gradient_norm()
            nn.utils.clip_grads_with_norm_(self.own.values(), self.clip_norm, norm)
        self._update(hyper)
        if self.owned:
            self.owned.share()

    def zero_grad(self) -> None:
        """Clears the gradients."""
        for parameter in self.named.values():
            parameter.grad = None

    def gradient_norm(self) -> Tensor:
        """The global L2 norm of the current gradients."""
        gradients = {n: p.grad for n, p in self.own.items() if p.grad is not None}
        return self.norms.total(gradients)

    @abstractmethod
    def moments(self) -> dict[str, Tensor]:
        """Canonical name -> moment."""

    @abstractmethod
    def _update(self, hyper: Hyper) -> None:
        """Does one update with the rates of this step."""

    def _moments(self, kind: str, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Moments of one kind by canonical name. Those of others are on the device "meta"."""
        return {
            f"optimizer.{kind}.{name}": own[name]
            if name in own
            else torch.empty_like(parameter, device="meta")
            for name, parameter in self.named.items()
        }

    def _param_groups(self) -> list[dict[str, list[nn.Parameter]]]:
        """The groups as PyTorch's optimizers take them."""
        own = [{"params": [self.named[name] for name in part]} for part in self.groups.values()]
        return own or [{"params": []}]  # a stage of a pipeline may train nothing

    def _set_rates(self, native: torch.optim.Optimizer, hyper: Hyper) -> None:
        for group, options in zip(self.groups, native.param_groups, strict=False):
            lr, decay = groups.rates(group, self.spec, hyper)
            options.update(lr=lr, weight_decay=decay)


class AdamW(Optimizer):
    """PyTorch's fused AdamW."""

    kinds = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        named: Mapping[str, nn.Parameter],
        spec: AdamWSpec,
        members: Mapping[str, groups.Group],
        norms: Norms = WHOLE_NORMS,
        owned: Owned | None = None,
    ) -> None:
        super().__init__(named, spec, members, norms, owned)
        self._adamw = torch.optim.AdamW(
            self._param_groups(), betas=spec.betas, eps=spec.eps, fused=True
        )
        self._count = 0
        for parameter in self.own.values():
            # PyTorch would make the state at the first step. Here it is complete from the start.
            self._adamw.state[parameter] = {
                "step": torch.zeros((), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }

    def moments(self) -> dict[str, Tensor]:
        """See ``Optimizer``."""
        states = {name: self._adamw.state[parameter] for name, parameter in self.own.items()}
        first, second = (
            self._moments(kind, {name: state[kind] for name, state in states.items()})
            for kind in self.kinds
        )
        return {**first, **second}

    @property
    def count(self) -> int:
        """See ``Optimizer``."""
        return self._count

    @count.setter
    def count(self, value: int) -> None:
        """Sets the number of updates done."""
        self._count = value
        for state in self._adamw.state.values():
            state["step"].fill_(value)

    def _update(self, hyper: Hyper) -> None:
        self._set_rates(self._adamw, hyper)
        self._adamw.step()
        self._count += 1


class Sgd(Optimizer):
    """PyTorch's fused SGD with momentum. Weight decay is added to the gradient of every tensor."""

    def __init__(
        self,
        named: Mapping[str, nn.Parameter],
        spec: SgdSpec,
        members: Mapping[str, groups.Group],
        norms: Norms = WHOLE_NORMS,
        owned: Owned | None = None,
    ) -> None:
        super().__init__(named, spec, members, norms, owned)
        self.count = 0
        self._sgd = torch.optim.SGD(self._param_groups(), momentum=spec.momentum, fused=True)
        for parameter in self.own.values():
            self._sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)

    def moments(self) -> dict[str, Tensor]:
        """See ``Optimizer``."""
        states = {name: self._sgd.state[parameter] for name, parameter in self.own.items()}
        buffers = {name: state["momentum_buffer"] for name, state in states.items()}
        return self._moments("momentum_buffer", buffers)

    def _update(self, hyper: Hyper) -> None:
        self._set_rates(self._sgd, hyper)
        self._sgd.step()
        self.count += 1


class Lars(Optimizer):
    """LARS (see ``core.reference.optim``). PyTorch has none.

    The operations on lists (``torch._foreach_*``) have no public names. PyTorch's own optimizers
    use them, too: a loop over the tensors would start a kernel for each one.
    """

    spec: LarsSpec

    def __init__(
        self,
        named: Mapping[str, nn.Parameter],
        spec: LarsSpec,
        members: Mapping[str, groups.Group],
        norms: Norms = WHOLE_NORMS,
        owned: Owned | None = None,
    ) -> None:
        super().__init__(named, spec, members, norms, owned)
        self.count = 0
        self._buffers = {name: torch.zeros_like(p) for name, p in self.own.items()}
        self._scaled: dict[groups.Group, list[str]] = {}
        for name, parameter in self.own.items():
            if parameter.ndim > 1:
                self._scaled.setdefault(members[name], []).append(name)

    def moments(self) -> dict[str, Tensor]:
        """See ``Optimizer``."""
        return self._moments("momentum_buffer", self._buffers)

    @torch.no_grad()
    def _update(self, hyper: Hyper) -> None:
        self._decay_and_scale(hyper)
        for group, names in self.groups.items():
            if not names:
                continue
            lr, _ = groups.rates(group, self.spec, hyper)
            values, buffers = ([owner[n] for n in names] for owner in (self.named, self._buffers))
            entering, leaving = buffer_rates(self.spec, lr)
            torch._foreach_mul_(buffers, self.spec.momentum)
            torch._foreach_add_(buffers, [p.grad for p in values], alpha=entering)
            torch._foreach_add_(values, buffers, alpha=-leaving)
        self.count += 1

    def _decay_and_scale(self, hyper: Hyper) -> None:
        """Decays and scales the gradients of tensors of more than one dimension, in place."""
        for group, names in self._scaled.items():
            _, decay = groups.rates(group, self.spec, hyper)
            values = [self.named[name] for name in names]
            gradients = [value.grad for value in values]
            ratios = self._decay(names, values, gradients, decay)
            torch._foreach_mul_(gradients, ratios.unbind())

    def _decay(
        self, names: list[str], values: list[nn.Parameter], gradients: list[Tensor], decay: float
    ) -> Tensor:
        """Adds the weight decay to the gradients in place, and returns the trust ratios."""

        def norms_of(tensors: Sequence[Tensor]) -> Tensor:
            return self.norms.of(dict(zip(names, tensors, strict=True)))

        norms = norms_of(values)
        trusted = self.spec.trust_coefficient * norms
        if self.spec.form == "mmpretrain":
            ratios = trusted / (norms_of(gradients) + decay * norms + TRUST_EPSILON)
        torch._foreach_add_(gradients, values, alpha=decay)
        if self.spec.form == "moco_v3":
            decayed = norms_of(gradients)
            ratios = torch.where((norms > 0) & (decayed > 0), trusted / decayed, 1.0)
        return ratios


OPTIMIZERS = {"adamw": AdamW, "sgd": Sgd, "lars": Lars}
