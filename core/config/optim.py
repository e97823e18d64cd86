"""The ``optim`` section: optimizers and their schedules."""

import itertools
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from triptych.core.config.fields import (
    Bool,
    Decay,
    Float,
    Fraction,
    KeyedError,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
)
from triptych.core.config.model import EncoderSpec, VitSpec


class OptimSpec(Section):
    """The keys that all optimizers share: rates and their schedules."""

    lr: PositiveFloat
    """Base learning rate. See scale_lr_by for the peak."""
    scale_lr_by: PositiveInt | None = 256
    """Linear rule for the peak learning rate: lr * batch_size / scale_lr_by; null: lr."""
    weight_decay: NonNegativeFloat
    weight_decay_end: NonNegativeFloat | None = None
    """Final weight decay, reached on a half-cosine from weight_decay; null: constant."""
    clip_norm: PositiveFloat | None = None
    """Limit to which the global L2 norm of the gradients is clipped; null: no clipping."""
    schedule: Literal["cosine", "multistep", "constant"] = "cosine"
    """Schedule of the learning rate after the warm-up."""
    milestones: tuple[NonNegativeFloat, ...] = ()
    """For multistep: times at which the learning rate drops, in epochs, or in steps if train.steps
    is given."""
    factor: PositiveFloat = 0.1
    """For multistep: factor on the learning rate at each milestone."""
    warmup_epochs: NonNegativeFloat | None = None
    warmup_steps: NonNegativeInt | None = None
    warmup_start_lr: NonNegativeFloat = 0.0
    """Learning rate at the start of the warm-up, from which it rises on a straight line. The
    linear rule does not change it."""
    warmup_reaches_peak: Bool = False
    """true: the last step of the warm-up has the peak learning rate (mmpretrain). false: the step
    after the warm-up is the first with it."""
    warmup_shifts_cosine: Bool = True
    """For cosine. true: the cosine begins at its peak when the warm-up ends. false: the cosine
    begins with the run, and the warm-up hides its first part (timm, DeiT)."""
    end_lr: NonNegativeFloat = 0.0
    """For cosine: learning rate at the end."""
    lr_epochs_mul: Annotated[Float, Field(ge=1)] = 1.0
    """For cosine: length of the cosine relative to the length of the run (MOCA: 1.25). The run then
    ends before the cosine does. The length is rounded down to whole epochs, or to whole steps if
    train.steps is given."""
    per: Literal["step", "epoch"] = "step"
    """step: schedules advance at every step. epoch: once per epoch."""
    lag_epochs: NonNegativeInt = 0
    """For per epoch: number of epochs by which the learning rate comes late. DeiT's comes 1 late:
    the first two epochs have the rate at the start of the warm-up."""

    def contradictions(self) -> Iterator[KeyedError]:
        """Reports a warm-up in two units, and keys that do not fit the schedule."""
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
        if self.schedule != "cosine" and not self.warmup_shifts_cosine:
            yield KeyedError(
                "warmup_shifts_cosine", f"schedule {self.schedule} has no cosine; leave it at true"
            )
        if self.per != "epoch" and self.lag_epochs:
            yield KeyedError("lag_epochs", f"{self.lag_epochs}: only with per epoch, or 0")
        if any(late <= early for early, late in itertools.pairwise(self.milestones)):
            yield KeyedError("milestones", "expected ascending numbers")


class AdamWSpec(OptimSpec):
    """AdamW (arXiv 1711.05101)."""

    name: Literal["adamw"] = "adamw"
    lr: PositiveFloat = 1.5e-4
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled weight decay of the tensors that decay_on selects."""
    decay_on: Literal["all", "matrices", "weights"] = "all"
    """Tensors with weight decay. all: every tensor with a gradient, including biases and norms
    (MoCo v3). matrices: tensors of two or more dimensions that are no bias, including the class and
    mask tokens (MOCA, LiBai). weights: those without class token and position table (fine-tuning by
    timm, DeiT, MOCA and mmpretrain)."""
    layer_decay: Fraction = 1.0
    """Factor on the learning rate from each layer of a ViT to the layer before (arXiv 2106.08254).
    The classifier and the last norm have the full rate, the last block layer_decay times the full
    rate, and class token, positions and patch embedding the smallest. 1: the same for all."""
    generator_lr: PositiveFloat | None = None
    """Constant learning rate of MOCA's weight generators, which compute the weights of the
    predictors. Their weight decay is constant, too. null: the schedules of the other tensors."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8


class SgdSpec(OptimSpec):
    """Stochastic gradient descent with momentum, without Nesterov's form and without dampening."""

    name: Literal["sgd"]
    lr: PositiveFloat = 0.03
    weight_decay: NonNegativeFloat = 1e-4
    """Weight decay, added to each gradient, including those of biases and norms (MoCo v1)."""
    momentum: Decay = 0.9


class LarsSpec(OptimSpec):
    """LARS (arXiv 1708.03888).

    Tensors of at most one dimension (biases, gains and shifts of norms) have no weight decay and no
    trust ratio.
    """

    name: Literal["lars"]
    form: Literal["moco_v3", "mmpretrain"] = "moco_v3"
    """moco_v3: the trust ratio is trust_coefficient * |w| / |g + weight_decay * w|, or 1 where a
    norm is 0, and the momentum buffer holds gradients without the learning rate. mmpretrain: the
    trust ratio is trust_coefficient * |w| / (|g| + weight_decay * |w| + 1e-8), and the momentum
    buffer holds gradients times the learning rate of their step. The two differ where the learning
    rate changes."""
    lr: PositiveFloat = 0.3
    weight_decay: NonNegativeFloat = 1e-6
    """Weight decay, added to the gradient. The trust ratio multiplies the sum."""
    momentum: Decay = 0.9
    trust_coefficient: PositiveFloat = 0.001
    """Factor in the trust ratio."""


def _adamw_by_default(section: Any) -> Any:
    """Makes AdamW the optimizer of a section without name, as of a spec without the section."""
    return {"name": "adamw", **section} if isinstance(section, dict) else section


AnyOptimSpec = Annotated[
    AdamWSpec | SgdSpec | LarsSpec, BeforeValidator(_adamw_by_default), Field(discriminator="name")
]


def layer_decay_contradictions(optim: OptimSpec, model: EncoderSpec) -> Iterator[KeyedError]:
    """Reports a layer decay for an encoder without layers to count."""
    decay = optim.layer_decay if isinstance(optim, AdamWSpec) else 1.0
    if decay != 1.0 and not isinstance(model, VitSpec):
        yield KeyedError("optim.layer_decay", f"{decay:g}: only a ViT has it; set 1")
