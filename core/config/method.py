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


class QueueSpec(Section):
    """What MoCo v1 and v2 share: negatives come from a queue of earlier keys."""

    temperature: PositiveFloat
    output_dim: PositiveInt = 128
    queue_size: PositiveInt = 65536
    """Keys kept; at least the batch. Each step's keys take the place of the oldest ones, from the
    start of the queue again where they pass its end."""
    momentum: Probability = 0.999
    """EMA momentum of the teacher (the key encoder)."""
    momentum_schedule: Literal["cosine", "constant"] = "constant"
    """cosine: rises to 1 over the run."""
    head_init: Literal["torch", "paddle"] = "torch"
    """torch: weights and biases U(-b, b), b = 1 / sqrt(inputs). paddle (PaddleFleetX): the last
    layer N(0, 0.01), a hidden one Xavier-uniform, biases 0."""


class MocoV1Spec(QueueSpec):
    """MoCo v1 (arXiv 1911.05722): one linear layer behind the encoder."""

    name: Literal["moco_v1"]
    temperature: PositiveFloat = 0.07


class MocoV2Spec(QueueSpec):
    """MoCo v2 (arXiv 2003.04297): two linear layers with ReLU between them."""

    name: Literal["moco_v2"]
    temperature: PositiveFloat = 0.2
    hidden_dim: PositiveInt | None = None
    """Width between the two layers; null: that of the encoder's feature."""


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


MethodSpec = Annotated[MocoV1Spec | MocoV2Spec | MocoV3Spec, Field(discriminator="name")]
