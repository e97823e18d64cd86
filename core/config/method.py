"""The ``method`` section: what is learned from two views."""

from collections.abc import Iterator
from typing import Annotated, Literal, NamedTuple

from pydantic import Field

from triptych.core.config.fields import (
    Bool,
    Int,
    KeyedError,
    NonNegativeInt,
    OpenFraction,
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


class Round(NamedTuple):
    """Numbers of tokens of one masking round: seen by the student, and predicted."""

    visible: int
    decoded: int


def rounds(
    length: int, mask_ratios: tuple[float, float], decoder_ratios: tuple[float, float]
) -> tuple[Round, Round]:
    """Both rounds' numbers.

    Args:
        length: tokens of an image.
        mask_ratios, decoder_ratios: parts of them that are left out.
    """
    pairs = zip(mask_ratios, decoder_ratios, strict=True)
    # Truncated, as the released code does it.
    one, two = (Round(int(length * (1 - m)), int(length * (1 - d))) for m, d in pairs)
    return one, two


class MocaSpec(Section):
    """MOCA (arXiv 2307.09361), with the released code's names and defaults where they differ."""

    name: Literal["moca"]
    words: PositiveInt = 4096
    """Visual words in the codebook: teacher tokens of earlier steps."""
    new_words: PositiveInt = 32
    """Words that a step replaces, over all ranks of ``word_ranks``."""
    word_ranks: PositiveInt = 1
    """Devices that the batch is spread over as far as the codebook is concerned; no device has to
    be there. The released models: 8."""
    words_from: Literal["first_rank", "all_ranks"] = "first_rank"
    """first_rank: the released models' codebook. Only the first rank's share of the new words
    enters, from its share of the batch; what other ranks picked is overwritten when buffers are
    broadcast. all_ranks: what the paper says. All new words enter, from the whole batch."""
    kappa: PositiveFloat = 3.0
    """Inverse temperature of the predictions; the features are not normalised."""
    inverse_delta: PositiveFloat = 10.0
    """Sharpness of the teacher's assignments, relative to how much its distances differ."""
    border: NonNegativeInt = 2
    """Rows and columns of tokens at each edge that enter neither bags of words nor codebook."""
    early_layer: NonNegativeInt = 4
    """Blocks before the last whose output feeds the decoder; 0: the last one's, normalised."""
    mask_ratios: tuple[OpenFraction, OpenFraction] = (0.55, 0.75)
    """Part of the tokens that the student does not see, in each masking round."""
    decoder_ratios: tuple[OpenFraction, OpenFraction] = (0.35, 0.55)
    """Part of the tokens that are not decoded, in each round."""
    pooling: Literal["mean", "cls"] = "mean"
    """The student's feature of an image: mean of the visible patch tokens, or class token."""
    predictor_ratio: PositiveFloat = 2.0
    """Hidden width of the networks that make the predictors' weights, over the encoder's width."""
    decoder_width: PositiveInt = 512
    decoder_depth: PositiveInt = 2
    decoder_heads: PositiveInt = 16
    image_weight: PositiveFloat = 0.5
    dense_weight: PositiveFloat = 0.5
    """Of the two losses, each of which is twice the mean divergence of its rounds."""
    momentum: Probability = 0.994
    """EMA momentum of the teacher at the start."""
    momentum_schedule: Literal["cosine", "constant"] = "cosine"
    """cosine: rises to 1 over the run."""

    def contradictions(self) -> Iterator[KeyedError]:
        """Widths that do not divide, shares that are no whole number, a codebook too small."""
        if self.decoder_width % self.decoder_heads:
            yield KeyedError(
                "decoder_heads",
                f"decoder_width {self.decoder_width} is not divisible by {self.decoder_heads}",
            )
        if self.decoder_width % 4:
            yield KeyedError(
                "decoder_width", f"{self.decoder_width} is not divisible by 4 (position table)"
            )
        if self.new_words % self.word_ranks:
            yield KeyedError(
                "new_words", f"{self.new_words} is not divisible by word_ranks {self.word_ranks}"
            )
        if self.words < 2:
            yield KeyedError("words", "1: batch norm over the words needs 2 at least")
        if self.step_words > self.words:
            yield KeyedError(
                "new_words", f"a step's {self.step_words} are more than the {self.words} words"
            )

    @property
    def step_words(self) -> int:
        """Words that a step really replaces."""
        return self.new_words // self.word_ranks if self._first_only else self.new_words

    def rounds(self, length: int) -> tuple[Round, Round]:
        """Numbers of tokens of both masking rounds, of ``length`` tokens of an image."""
        return rounds(length, self.mask_ratios, self.decoder_ratios)

    def word_images(self, batch_size: int) -> int:
        """Images of a batch, from its first on, that words are taken from."""
        return batch_size // self.word_ranks if self._first_only else batch_size

    @property
    def _first_only(self) -> bool:
        return self.words_from == "first_rank"


MethodSpec = Annotated[MocoV1Spec | MocoV2Spec | MocoV3Spec | MocaSpec, Field(discriminator="name")]
