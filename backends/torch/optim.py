"""Optimizers bound to named parameters; their state has canonical names."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from triptych.core.config.spec import OptimSpec
from triptych.core.engine import Hyper


class AdamW:
    """PyTorch's AdamW, fused, one group: decay on every tensor that has a gradient.

    Args:
        named: canonical name -> trainable parameter.
    """

    def __init__(self, named: Mapping[str, nn.Parameter], spec: OptimSpec) -> None:
        self.named = dict(named)
        self.clip_norm = spec.clip_norm
        self._adamw = torch.optim.AdamW(
            self.named.values(), betas=spec.betas, eps=spec.eps, fused=True
        )
        for parameter in self.named.values():
            # Made now and not at the first step, so that the state is complete from the start.
            self._adamw.state[parameter] = {
                "step": torch.zeros((), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }

    def step(self, hyper: Hyper) -> None:
        """Clips where the spec says so, then one update."""
        if self.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.named.values(), self.clip_norm)
        for group in self._adamw.param_groups:
            group.update(lr=hyper.lr, weight_decay=hyper.weight_decay)
        self._adamw.step()

    def zero_grad(self) -> None:
        """Forgets the gradients."""
        self._adamw.zero_grad(set_to_none=True)

    def gradient_norm(self) -> Tensor:
        """Global L2 norm of the gradients as they stand."""
        return nn.utils.get_total_norm([p.grad for p in self.named.values() if p.grad is not None])

    def moments(self) -> dict[str, Tensor]:
        """Canonical name -> moment."""
        return {
            f"optimizer.{kind}.{name}": self._adamw.state[parameter][kind]
            for kind in ("exp_avg", "exp_avg_sq")
            for name, parameter in self.named.items()
        }

    @property
    def count(self) -> int:
        """Updates done so far."""
        return int(next(iter(self._adamw.state.values()))["step"])

    @count.setter
    def count(self, value: int) -> None:
        for state in self._adamw.state.values():
            state["step"].fill_(value)


OPTIMIZERS = {"adamw": AdamW}
