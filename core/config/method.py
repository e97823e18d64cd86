"""The ``method`` section: the self-supervised method, or the probe or fine-tuning of an encoder."""

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal, NamedTuple

from pydantic import Field

from triptych.core.config.fields import (
    Bool,
    Float,
    Int,
    KeyedError,
    NonNegativeFloat,
    NonNegativeInt,
    OpenFraction,
    PositiveFloat,
    PositiveInt,
    Probability,
    Section,
)
from triptych.core.config.mixing import MixSpec


class AnyMethodSpec(Section):
    """What all methods share.

    Attributes:
        views: number of augmented views of each image.
        labelled: whether the method learns from labels.
    """

    views: ClassVar[int] = 2
    labelled: ClassVar[bool] = False


TeacherStatistics = Literal["own", "averaged", "copied"]


class MocoSpec(AnyMethodSpec):
    """The keys that all versions of MoCo share."""

    teacher_statistics: TeacherStatistics = "own"
    """What an update of the teacher does to the running statistics of its batch norms. own:
    nothing (MoCo). averaged: it averages them like the weights (PaddleFleetX, PLSC). copied: it
    copies the student's, with the numbers of batches (mmpretrain). The keys of each step then enter
    them in any case. No loss depends on them, only the teacher's features."""


class QueueSpec(MocoSpec):
    """The keys that MoCo v1 and v2 share. Their negatives come from a queue of earlier keys."""

    temperature: PositiveFloat
    output_dim: PositiveInt = 128
    queue_size: PositiveInt = 65536
    """Number of keys in the queue; at least the batch size. The keys of each step replace the
    oldest ones, and continue at the start of the queue after its end."""
    momentum: Probability = 0.999
    """EMA momentum of the teacher (the key encoder)."""
    momentum_schedule: Literal["cosine", "constant"] = "constant"
    """cosine: rises to 1 over the run."""
    head_init: Literal["torch", "paddle"] = "torch"
    """Initial values of the head. torch: weights and biases U(-b, b), b = 1 / sqrt(inputs). paddle
    (PaddleFleetX): last layer N(0, 0.01), hidden layer Xavier-uniform, biases 0."""


class MocoV1Spec(QueueSpec):
    """MoCo v1 (arXiv 1911.05722): one linear layer after the encoder."""

    name: Literal["moco_v1"]
    temperature: PositiveFloat = 0.07


class MocoV2Spec(QueueSpec):
    """MoCo v2 (arXiv 2003.04297): two linear layers after the encoder, with ReLU between them."""

    name: Literal["moco_v2"]
    temperature: PositiveFloat = 0.2
    hidden_dim: PositiveInt | None = None
    """Width between the two layers; null: the width of the encoder's feature."""


class MocoV3Spec(MocoSpec):
    """MoCo v3 (arXiv 2104.02057)."""

    name: Literal["moco_v3"]
    temperature: PositiveFloat = 0.2
    hidden_dim: PositiveInt = 4096
    """Width of the hidden layers of projector and predictor."""
    output_dim: PositiveInt = 256
    projector_layers: Annotated[Int, Field(ge=2)] = 3
    predictor_layers: Annotated[Int, Field(ge=2)] = 2
    predictor_hidden_dim: PositiveInt | None = None
    """Width of the hidden layers of the predictor; null: hidden_dim."""
    predictor_last_norm: Bool = True
    """Batch norm after the predictor (ViT: yes, ResNet: no)."""
    last_norm_affine: Bool = False
    """Whether the batch norms after projector and predictor have gain and shift (LiBai)."""
    momentum: Probability = 0.99
    """EMA momentum of the teacher at the start."""
    momentum_schedule: Literal["cosine", "constant"] = "cosine"
    """cosine: rises to 1 over the run."""


class Round(NamedTuple):
    """Numbers of tokens per image in one masking round.

    Attributes:
        visible: tokens that the student sees.
        decoded: tokens that the decoder predicts.
    """

    visible: int
    decoded: int


def rounds(
    length: int, mask_ratios: tuple[float, float], decoder_ratios: tuple[float, float]
) -> tuple[Round, Round]:
    """The numbers of tokens in both masking rounds.

    Args:
        length: number of tokens of an image.
        mask_ratios: fraction of tokens that the student does not see, in each round.
        decoder_ratios: fraction of tokens that are not decoded, in each round.
    """
    pairs = zip(mask_ratios, decoder_ratios, strict=True)
    # The released code truncates, too.
    round1, round2 = (Round(int(length * (1 - m)), int(length * (1 - d))) for m, d in pairs)
    return round1, round2


class MocaSpec(AnyMethodSpec):
    """MOCA (arXiv 2307.09361). Where paper and released code differ, the code's defaults apply."""

    name: Literal["moca"]
    words: PositiveInt = 4096
    """Number of visual words in the codebook. The words are teacher tokens of earlier steps."""
    new_words: PositiveInt = 32
    """Number of words that a step replaces, summed over ``word_ranks``."""
    word_ranks: PositiveInt = 1
    """Number of devices among which the codebook divides the batch. The devices need not exist. The
    released models used 8."""
    words_from: Literal["first_rank", "all_ranks"] = "first_rank"
    """first_rank: as in the released models, only the first rank's share of the new words enters
    the codebook, from its share of the batch. (There the broadcast of buffers overwrites the words
    of the other ranks.) all_ranks: as in the paper, all new words enter, from the whole batch."""
    kappa: PositiveFloat = 3.0
    """Inverse temperature of the predictions. The features are not normalised."""
    inverse_delta: PositiveFloat = 10.0
    """Sharpness of the teacher's assignments. It is divided by the running mean of the difference
    between a token's largest and mean cosine."""
    border: NonNegativeInt = 2
    """Number of token rows and columns at each edge that bags of words and codebook omit."""
    early_layer: NonNegativeInt = 4
    """The decoder reads the output of the block this far before the last. 0: that of the last
    block, normalised."""
    mask_ratios: tuple[OpenFraction, OpenFraction] = (0.55, 0.75)
    """Fraction of tokens that the student does not see, in each masking round."""
    decoder_ratios: tuple[OpenFraction, OpenFraction] = (0.35, 0.55)
    """Fraction of tokens that are not decoded, in each masking round."""
    pooling: Literal["mean", "cls"] = "mean"
    """The student's feature of an image. mean: mean of the visible patch tokens. cls: class
    token."""
    predictor_ratio: PositiveFloat = 2.0
    """Hidden width of the weight generators, relative to the encoder's width."""
    decoder_width: PositiveInt = 512
    decoder_depth: PositiveInt = 2
    decoder_heads: PositiveInt = 16
    image_weight: PositiveFloat = 0.5
    """Weight of the image loss."""
    dense_weight: PositiveFloat = 0.5
    """Weight of the dense loss. Each loss is twice the mean divergence of its rounds."""
    momentum: Probability = 0.994
    """EMA momentum of the teacher at the start."""
    momentum_schedule: Literal["cosine", "constant"] = "cosine"
    """cosine: rises to 1 over the run."""

    def contradictions(self) -> Iterator[KeyedError]:
        """Reports widths that do not divide, fractional shares, and a codebook of too few words."""
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
        """Number of words that a step really replaces."""
        return self.new_words // self.word_ranks if self._first_only else self.new_words

    def rounds(self, length: int) -> tuple[Round, Round]:
        """The numbers of tokens in both masking rounds, for images of ``length`` tokens."""
        return rounds(length, self.mask_ratios, self.decoder_ratios)

    def word_images(self, batch_size: int) -> int:
        """Number of images, from the first of the batch on, that supply words."""
        return batch_size // self.word_ranks if self._first_only else batch_size

    @property
    def _first_only(self) -> bool:
        return self.words_from == "first_rank"


class SupervisedSpec(AnyMethodSpec):
    """The keys that linear probe and fine-tuning share. Both learn a classifier from labels."""

    views: ClassVar[int] = 1
    labelled: ClassVar[bool] = True

    classes: Annotated[Int, Field(ge=2, le=10**6)]
    """Number of classes. The labels of the data are 0 to classes - 1."""
    head_std: PositiveFloat = 0.01
    """Standard deviation of the classifier's initial weights. Its biases start at 0."""

    @property
    def momentum_schedule(self) -> Literal["constant"]:
        """The schedule of a moving average of the weights."""
        return "constant"


class Probe(NamedTuple):
    """One classifier of a linear probe.

    Attributes:
        rate: learning rate relative to ``optim.lr``.
        weight_decay: of this classifier; None: ``optim.weight_decay``.
    """

    rate: float
    weight_decay: float | None


class LinearSpec(SupervisedSpec):
    """Linear probe: linear classifiers on the features of a frozen encoder."""

    name: Literal["linear"]
    pooling: Literal["cls", "mean", "both"] = "cls"
    """The features of an image. cls: class token. mean: mean of the patch tokens. both: class
    tokens, then the mean of the last block's patch tokens. All pass the last norm. A ResNet has
    the mean over its feature map instead of a class token."""
    blocks: PositiveInt = 1
    """Number of last blocks whose class tokens are features, the oldest first."""
    rates: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] = (1.0,)
    """Learning rate of each classifier, relative to optim.lr. Several classifiers are trained in
    one pass over the data, each with its own optimizer state."""
    weight_decays: tuple[NonNegativeFloat, ...] = ()
    """Weight decays to combine with each rate; empty: optim.weight_decay."""
    features: Literal["augmented", "cached"] = "augmented"
    """augmented: features of newly augmented images at every step. cached: features computed once,
    of images prepared as for evaluation."""

    @property
    def momentum(self) -> None:
        """There is no teacher."""

    @property
    def probes(self) -> tuple[Probe, ...]:
        """The classifiers: for each rate one of each weight decay."""
        decays = self.weight_decays or (None,)
        return tuple(Probe(rate, decay) for rate in self.rates for decay in decays)


class FinetuneSpec(SupervisedSpec):
    """Fine-tuning: the encoder and a linear classifier are trained together."""

    name: Literal["finetune"]
    pooling: Literal["cls", "mean"] = "cls"
    """The feature of an image. cls: class token. mean: mean of the patch tokens."""
    drop_path: Annotated[Float, Field(ge=0, lt=1)] = 0.0
    """Probability that a sample skips a residual branch of the last block (arXiv 1603.09382). It
    rises linearly from 0 at the first block."""
    mixing: MixSpec = MixSpec()
    """Mixed images (Mixup, CutMix) and smoothed targets."""
    momentum: Probability | None = None
    """Momentum of the weights' moving average, which is the teacher; null: no average."""
    ema_rule: Literal["timm", "mmengine"] = "timm"
    """What the moving average does besides the weights. timm: it also averages the running
    statistics of batch norm. mmengine: it copies these statistics, and its first update copies the
    weights, too."""


MethodSpec = Annotated[
    MocoV1Spec | MocoV2Spec | MocoV3Spec | MocaSpec | LinearSpec | FinetuneSpec,
    Field(discriminator="name"),
]
