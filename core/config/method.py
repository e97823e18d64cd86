"""The ``method`` section: what is learned from two views."""

from typing import Annotated, Literal

from pydantic import Field

from triptych.core.config.fields import (
    Bool,
    Int,
    PositiveFloat,
    PositiveInt,
    Probability,
    Section,
)


class MocoV3Spec(Section):
    """MoCo v3 (arXiv 2104.02057)."""

    name: Literal["moco_v3"]
    temperature: PositiveFloat = 0.2
    hidden_dim: PositiveInt = 4096
    """Width of the hidden layers of projector and predictor."""
    output_dim: PositiveInt = 256
    projector_layers: Annotated[Int, Field(ge=2)] = 3
    predictor_layers: Annotated[Int, Field(ge=2)] = 2
    predictor_last_norm: Bool = True
    """Batch norm without gain and shift after the predictor (ViT: yes, ResNet: no)."""
    momentum: Probability = 0.99
    """EMA momentum of the teacher at the start."""
    momentum_schedule: Literal["cosine", "constant"] = "cosine"
    """cosine: rises to 1 over the run."""
