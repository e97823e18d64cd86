"""Optimizers of named parameters. The tensors of their state have canonical names."""

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from triptych.core.config.spec import AdamWSpec, LarsSpec, OptimSpec, SgdSpec
from triptych.core.contracts import Hyper
from triptych.core.optim import groups


class Optimizer(ABC):
    """Implements ``core.contracts.Optimizer``. Subclasses are the rules.

    Args:
        named: canonical name -> trainable parameter.
    """

    count: int
    """Number of updates done."""

    def __init__(self, named: Mapping[str, nn.Parameter], spec: OptimSpec) -> None:
        self.named = dict(named)
        self.clip_norm = spec.clip_norm

    def step(self, hyper: Hyper) -> None:
        """Clips the gradients if the spec has ``clip_norm``, then does one update."""
        if self.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.named.values(), self.clip_norm)
        self._update(hyper)

    def zero_grad(self) -> None:
        """Clears the gradients."""
        for parameter in self.named.values():
            parameter.grad = None

    def gradient_norm(self) -> Tensor:
        """The global L2 norm of the current gradients."""
        return nn.utils.get_total_norm([p.grad for p in self.named.values() if p.grad is not None])

    @abstractmethod
    def moments(self) -> dict[str, Tensor]:
        """Canonical name -> moment."""

    @abstractmethod
    def _update(self, hyper: Hyper) -> None:
        """Does one update with the rates of this step."""


class AdamW(Optimizer):
    """PyTorch's fused AdamW with the parameter groups of ``core.optim.groups``."""

    def __init__(self, named: Mapping[str, nn.Parameter], spec: AdamWSpec) -> None:
        super().__init__(named, spec)
        self._spec = spec
        members: dict[groups.Group, list[nn.Parameter]] = {}
        for name, parameter in named.items():
            members.setdefault(groups.group(name, parameter.ndim, spec), []).append(parameter)
        self._groups = list(members)
        param_groups = [{"params": parameters} for parameters in members.values()]
        self._adamw = torch.optim.AdamW(param_groups, betas=spec.betas, eps=spec.eps, fused=True)
        for parameter in named.values():
            # PyTorch would make the state at the first step. Here it is complete from the start.
            self._adamw.state[parameter] = {
                "step": torch.zeros((), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }

    def moments(self) -> dict[str, Tensor]:
        """See ``Optimizer``."""
        return {
            f"optimizer.{kind}.{name}": self._adamw.state[parameter][kind]
            for kind in ("exp_avg", "exp_avg_sq")
            for name, parameter in self.named.items()
        }

    @property
    def count(self) -> int:
        """See ``Optimizer``."""
        return int(next(iter(self._adamw.state.values()))["step"])

    @count.setter
    def count(self, value: int) -> None:
        """Sets the number of updates done."""
        for state in self._adamw.state.values():
            state["step"].fill_(value)

    def _update(self, hyper: Hyper) -> None:
        for group, options in zip(self._groups, self._adamw.param_groups, strict=True):
            lr, decay = groups.rates(group, self._spec, hyper)
            options.update(lr=lr, weight_decay=decay)
        self._adamw.step()


class Sgd(Optimizer):
    """PyTorch's fused SGD with momentum. Weight decay is added to the gradient of every tensor."""

    def __init__(self, named: Mapping[str, nn.Parameter], spec: SgdSpec) -> None:
        super().__init__(named, spec)
        self.count = 0
        self._sgd = torch.optim.SGD(named.values(), momentum=spec.momentum, fused=True)
        for parameter in named.values():
            self._sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)

    def moments(self) -> dict[str, Tensor]:
        """See ``Optimizer``."""
        return {
            f"optimizer.momentum_buffer.{name}": self._sgd.state[parameter]["momentum_buffer"]
            for name, parameter in self.named.items()
        }

    def _update(self, hyper: Hyper) -> None:
        for group in self._sgd.param_groups:
            group.update(lr=hyper.lr, weight_decay=hyper.weight_decay)
        self._sgd.step()
        self.count += 1


class Lars(Optimizer):
    """LARS in MoCo v3's form (see ``core.reference.optim.lars``). PyTorch has no LARS.

    The operations on lists (``torch._foreach_*``) have no public names. PyTorch's own optimizers
    use them, too: a loop over the tensors would start a kernel for each one.
    """

    def __init__(self, named: Mapping[str, nn.Parameter], spec: LarsSpec) -> None:
        super().__init__(named, spec)
        self.count = 0
        self._momentum, self._trust = spec.momentum, spec.trust_coefficient
        self._buffers = {name: torch.zeros_like(p) for name, p in self.named.items()}
        self._scaled = [p for p in self.named.values() if p.ndim > 1]

    def moments(self) -> dict[str, Tensor]:
        """See ``Optimizer``."""
        return {f"optimizer.momentum_buffer.{n}": b for n, b in self._buffers.items()}

    @torch.no_grad()
    def _update(self, hyper: Hyper) -> None:
        self._decay_and_scale(hyper.weight_decay)
        parameters, buffers = list(self.named.values()), list(self._buffers.values())
        torch._foreach_mul_(buffers, self._momentum)
        torch._foreach_add_(buffers, [p.grad for p in parameters])
        torch._foreach_add_(parameters, buffers, alpha=-hyper.lr)
        self.count += 1

    def _decay_and_scale(self, weight_decay: float) -> None:
        """Decays and scales the gradients of tensors of more than one dimension, in place."""
        gradients = [p.grad for p in self._scaled]
        torch._foreach_add_(gradients, self._scaled, alpha=weight_decay)
        norms = torch.stack(torch._foreach_norm(self._scaled))
        decayed = torch.stack(torch._foreach_norm(gradients))
        ratios = torch.where((norms > 0) & (decayed > 0), self._trust * norms / decayed, 1.0)
        torch._foreach_mul_(gradients, ratios.unbind())


OPTIMIZERS = {"adamw": AdamW, "sgd": Sgd, "lars": Lars}
