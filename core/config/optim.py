"""The ``optim`` section: optimizers and their schedules."""

import itertools
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from triptych.core.config.fields import (
    Decay,
    Float,
    KeyedError,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
)


class OptimSpec(Section):
    """What every optimizer has: rates and how they change."""

    lr: PositiveFloat
    """Base learning rate; see scale_lr_by."""
    scale_lr_by: PositiveInt | None = 256
    """Linear rule: peak = lr * batch_size / scale_lr_by; null: peak = lr."""
    weight_decay: NonNegativeFloat
    weight_decay_end: NonNegativeFloat | None = None
    """Half-cosine from weight_decay to this value; null: constant."""
    clip_norm: PositiveFloat | None = None
    """Clip the global L2 norm of the gradients; null: no clipping."""
    schedule: Literal["cosine", "multistep", "constant"] = "cosine"
    """After the warm-up."""
    milestones: tuple[NonNegativeFloat, ...] = ()
    """multistep: when the rate drops, in epochs, or in steps where train.steps is given."""
    factor: PositiveFloat = 0.1
    """multistep: what the rate is multiplied with at each milestone."""
    warmup_epochs: NonNegativeFloat | None = None
    warmup_steps: NonNegativeInt | None = None
    end_lr: NonNegativeFloat = 0.0
    """cosine: learning rate at the end."""
    lr_epochs_mul: Annotated[Float, Field(ge=1)] = 1.0
    """cosine: length of the cosine over that of the run, which ends before the rate does (MOCA:
    1.25). Rounded down to whole epochs, or steps where train.steps is given."""
    per: Literal["step", "epoch"] = "step"
    """Whether schedules advance with every step or once per epoch."""

    def contradictions(self) -> Iterator[KeyedError]:
        """One warm-up in two units; milestones that do not fit the schedule."""
        if self.warmup_epochs is not None and self.warmup_steps is not None:
            yield KeyedError(
                "warmup_steps",
                f"warmup_epochs is {self.warmup_epochs:g} and warmup_steps {self.warmup_steps}: "
                "set one of them to null",
            )
        if self.schedule == "multistep" and not self.milestones:
            yield KeyedError("milestones", "schedule multistep needs at least one")
        if self.schedule != "multistep" and self.milestones:
            yield KeyedError("milestones", f"schedule {self.schedule} has none; use multistep")
        if self.schedule != "cosine" and self.lr_epochs_mul != 1.0:
            yield KeyedError("lr_epochs_mul", f"schedule {self.schedule} has none; use cosine")
        if any(late <= early for early, late in itertools.pairwise(self.milestones)):
            yield KeyedError("milestones", "expected ascending numbers")


class AdamWSpec(OptimSpec):
    """AdamW (arXiv 1711.05101)."""

    name: Literal["adamw"] = "adamw"
    lr: PositiveFloat = 1.5e-4
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled; see decay_on."""
    decay_on: Literal["all", "matrices"] = "all"
    """all: every tensor that has a gradient, biases and norms included (MoCo v3). matrices: those
    of two dimensions or more that are no bias, tokens included (MOCA)."""
    generator_lr: PositiveFloat | None = None
    """A rate of their own, constant from the first step, for the networks that make the weights of
    MOCA's predictors; their weight decay stays at its start, too. null: as everything else."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8


class SgdSpec(OptimSpec):
    """Stochastic gradient descent with momentum, neither Nesterov's nor dampened."""

    name: Literal["sgd"]
    lr: PositiveFloat = 0.03
    weight_decay: NonNegativeFloat = 1e-4
    """Added to the gradient of every tensor that has one, biases and norms included (MoCo v1)."""
    momentum: Decay = 0.9


class LarsSpec(OptimSpec):
    """LARS (arXiv 1708.03888) as MoCo v3 has it.

    The learning rate stays outside the momentum buffer. Tensors of one dimension or none (biases,
    gains and shifts of norms) are neither decayed nor scaled.
    """

    name: Literal["lars"]
    lr: PositiveFloat = 0.3
    weight_decay: NonNegativeFloat = 1e-6
    """Added to the gradient before the trust ratio."""
    momentum: Decay = 0.9
    trust_coefficient: PositiveFloat = 0.001
    """A tensor's step is this times its own norm over that of its decayed gradient."""


def _adamw_by_default(given: Any) -> Any:
    """A section without a name is AdamW's, as the spec without that section is."""
    return {"name": "adamw", **given} if isinstance(given, dict) else given


AnyOptimSpec = Annotated[
    AdamWSpec | SgdSpec | LarsSpec, BeforeValidator(_adamw_by_default), Field(discriminator="name")
]
