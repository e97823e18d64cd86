"""The run spec: every key a YAML file may have, its type, its bounds and its meaning.

Attribute docstrings become the descriptions in ``configs/schema.json``. A spec is frozen; what is
derived from it (peak learning rate, steps per epoch, parameter table) lives beside its user.
"""

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, Strict, field_validator, model_validator

Int = Annotated[int, Strict()]
Bool = Annotated[bool, Strict()]
Str = Annotated[str, Strict()]
Float = Annotated[float, Strict(), Field(allow_inf_nan=False)]
PositiveInt = Annotated[Int, Field(gt=0)]
NonNegativeInt = Annotated[Int, Field(ge=0)]
PositiveFloat = Annotated[Float, Field(gt=0)]
NonNegativeFloat = Annotated[Float, Field(ge=0)]
Probability = Annotated[Float, Field(ge=0, le=1)]
Interval = tuple[Float, Float]


class KeyedError(ValueError):
    """A contradiction between keys, reported at the key that should change."""

    def __init__(self, key: str, message: str) -> None:
        super().__init__(message)
        self.key = key


class Section(BaseModel):
    """A mapping of the spec; unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


# ------------------------------------------------------------------------------------------- data


class DataSpec(Section):
    """Where images come from."""

    name: Literal["digits", "image_folder", "image_list", "cifar10"] = "digits"
    """digits: scikit-learn's, embedded. image_folder: any folder of images, with or without one
    sub-folder per class. image_list: CSV or text, one path (and label) per line. cifar10: its own
    files, python or binary version."""
    root: Str | None = None
    """Folder of the images; paths in a list are relative to it."""
    list: Str | None = None
    """image_list only: the CSV or text file."""
    eval_root: Str | None = None
    """image_folder: folder of the held-out images for k-NN; default: no evaluation split."""
    channels: Literal[1, 2, 3, 4] = 3
    """Channels given to the model: 1 grey, 2 grey+alpha, 3 RGB, 4 RGBA."""
    workers: NonNegativeInt = 0
    """Worker processes; 0 loads in the training process. Never changes a pixel."""
    prefetch: PositiveInt = 2
    """Batches kept ready per worker."""
    on_error: Literal["stop", "skip"] = "stop"
    """A damaged file: stop names it and ends the run; skip names it, counts it and takes the next
    sample of the epoch's order in its place."""

    @model_validator(mode="after")
    def _complete(self) -> "DataSpec":
        if self.name in ("image_folder", "cifar10") and self.root is None:
            raise KeyedError("root", f"data.name {self.name} needs data.root, the folder of the data")
        if self.name == "image_list" and self.list is None:
            raise KeyedError("list", "data.name image_list needs data.list, the CSV or text file")
        return self


# ---------------------------------------------------------------------------------------- augment


class AugmentOp(Section):
    """One operation of a view; drawn and applied in the order listed."""

    p: Probability = 1.0
    """Probability that the operation is applied."""


class RandomResizedCrop(AugmentOp):
    op: Literal["random_resized_crop"]
    scale: Interval = (0.08, 1.0)
    """Area of the crop as a fraction of the image."""
    ratio: Interval = (3 / 4, 4 / 3)
    """Aspect ratio of the crop, width / height."""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"


class RandomAffine(AugmentOp):
    op: Literal["random_affine"]
    degrees: NonNegativeFloat = 0.0
    """Rotation drawn from (-degrees, degrees)."""
    translate: Probability = 0.0
    """Shift drawn from (-translate, translate) times the image size, in each direction."""
    scale: Interval = (1.0, 1.0)
    shear: NonNegativeFloat = 0.0
    """Horizontal shear drawn from (-shear, shear), degrees."""


class ColorJitter(AugmentOp):
    op: Literal["color_jitter"]
    brightness: NonNegativeFloat = 0.0
    contrast: NonNegativeFloat = 0.0
    saturation: NonNegativeFloat = 0.0
    hue: Annotated[Float, Field(ge=0, le=0.5)] = 0.0
    """Shift drawn from (-hue, hue), turns of the colour circle."""


class Grayscale(AugmentOp):
    op: Literal["grayscale"]


class GaussianBlur(AugmentOp):
    op: Literal["gaussian_blur"]
    sigma: Interval = (0.1, 2.0)
    """Pillow blur radius, pixels."""


class Solarize(AugmentOp):
    op: Literal["solarize"]
    threshold: Annotated[Int, Field(ge=0, le=256)] = 128
    """Values from the threshold upwards are inverted."""


class HorizontalFlip(AugmentOp):
    op: Literal["horizontal_flip"]


Op = Annotated[
    RandomResizedCrop
    | RandomAffine
    | ColorJitter
    | Grayscale
    | GaussianBlur
    | Solarize
    | HorizontalFlip,
    Field(discriminator="op"),
]


class AugmentSpec(Section):
    """Two views of each image, then normalisation."""

    view1: tuple[Op, ...] = ()
    view2: tuple[Op, ...] = ()
    mean: tuple[Float, ...] = (0.485, 0.456, 0.406)
    """Per channel, of values in 0..1; one value serves all channels."""
    std: tuple[PositiveFloat, ...] = (0.229, 0.224, 0.225)
    eval_resize: PositiveFloat = 256 / 224
    """Evaluation: the shorter side is resized to this multiple of the image size, then the centre
    is cropped."""


# ------------------------------------------------------------------------------------------ model

VIT_PRESETS: dict[str, dict[str, int]] = {
    "vit_tiny": {"width": 192, "depth": 12, "heads": 3},
    "vit_small": {"width": 384, "depth": 12, "heads": 12},  # MoCo v3 gives ViT-S 12 heads, not 6
    "vit_base": {"width": 768, "depth": 12, "heads": 12},
    "vit_large": {"width": 1024, "depth": 24, "heads": 16},
    "vit": {},
}


class VitSpec(Section):
    """A vision transformer with timm's names and shapes."""

    name: Literal["vit", "vit_tiny", "vit_small", "vit_base", "vit_large"]
    """A named size fills width, depth and heads; "vit" wants them given."""
    image_size: PositiveInt | tuple[PositiveInt, PositiveInt] = 224
    """Pixels: one number for a square, or [height, width]."""
    channels: Literal[1, 2, 3, 4] = 3
    patch_size: PositiveInt = 16
    width: PositiveInt
    """Width of the residual stream; divisible by heads and by 4 (position table)."""
    depth: PositiveInt
    heads: PositiveInt
    mlp_ratio: PositiveInt = 4
    stem: Literal["patch"] = "patch"
    freeze_patch_embed: Bool = True
    """Keep the random patch projection fixed (MoCo v3, section 4.1)."""
    layer_norm_eps: PositiveFloat = 1e-6

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("name") in VIT_PRESETS:
            return {**VIT_PRESETS[given["name"]], **given}
        return given

    @model_validator(mode="after")
    def _divisible(self) -> "VitSpec":
        if self.width % self.heads:
            raise KeyedError("heads", f"width {self.width} is not divisible by heads {self.heads}")
        if self.width % 4:
            raise KeyedError("width", f"width {self.width} is not divisible by 4 (position table)")
        for size in self.size:
            if size % self.patch_size:
                raise KeyedError(
                    "image_size",
                    f"image size {size} is not divisible by patch_size {self.patch_size}",
                )
        return self

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of an image, pixels."""
        size = self.image_size
        return (size, size) if isinstance(size, int) else size

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of the patch grid."""
        return self.size[0] // self.patch_size, self.size[1] // self.patch_size


# ----------------------------------------------------------------------------------------- method


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


# ------------------------------------------------------------------------------------------ optim


class OptimSpec(Section):
    """Optimizer and its schedules."""

    name: Literal["adamw"] = "adamw"
    lr: PositiveFloat = 1.5e-4
    """Base learning rate; see scale_lr_by."""
    scale_lr_by: PositiveInt | None = 256
    """Linear rule: peak = lr * batch_size / scale_lr_by; null: peak = lr."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled; on every tensor that has a gradient, biases and norms included (MoCo v3)."""
    weight_decay_end: NonNegativeFloat | None = None
    """Half-cosine from weight_decay to this value; null: constant."""
    betas: tuple[Probability, Probability] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8
    clip_norm: PositiveFloat | None = None
    """Clip the global L2 norm of the gradients; null: no clipping."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """After the warm-up."""
    warmup_epochs: NonNegativeFloat | None = None
    warmup_steps: NonNegativeInt | None = None
    end_lr: NonNegativeFloat = 0.0
    per: Literal["step", "epoch"] = "step"
    """Whether schedules advance with every step or once per epoch."""

    @model_validator(mode="after")
    def _one_unit(self) -> "OptimSpec":
        if self.warmup_epochs is not None and self.warmup_steps is not None:
            raise KeyedError("warmup_steps", "give warmup_epochs or warmup_steps, not both")
        return self


# ------------------------------------------------------------------------------------ the run itself


class TrainSpec(Section):
    """How long and how much at once."""

    epochs: PositiveInt | None = None
    steps: PositiveInt | None = None
    """Exactly one of epochs and steps."""
    batch_size: PositiveInt = 256
    """Global batch: images per optimizer step over all ranks."""
    accumulate: Literal[1] = 1
    """Micro-batches per step; this version supports 1."""
    stop_at: PositiveInt | None = None
    """End the run after this step, with a checkpoint; changes no schedule."""

    @model_validator(mode="after")
    def _one_length(self) -> "TrainSpec":
        if (self.epochs is None) == (self.steps is None):
            raise KeyedError("steps", "give exactly one of train.epochs and train.steps")
        return self


class LogSpec(Section):
    """What is written while training."""

    every: PositiveInt = 10
    """Steps between log lines."""
    tensorboard: Bool = True


class CheckpointSpec(Section):
    """When the state is saved, and how many are kept."""

    every: NonNegativeInt = 1000
    """Steps between checkpoints; 0: only at the end (and on a signal)."""
    keep: PositiveInt = 3
    """Newest checkpoints kept."""


class EvaluateSpec(Section):
    """k-NN on frozen features while training."""

    every: NonNegativeInt = 0
    """Steps between evaluations, and one at the end; 0: never."""
    k: PositiveInt = 20
    """Neighbours that vote."""
    temperature: PositiveFloat = 0.07
    """A neighbour's vote weighs exp(cosine similarity / temperature)."""
    per_class: tuple[PositiveInt, ...] = (10,)
    """Besides all labels: evaluations with so many labelled images per class."""


class ParallelSpec(Section):
    """Degrees of parallelism; this version runs one process."""

    data: Literal[1] = 1
    tensor: Literal[1] = 1
    pipeline: Literal[1] = 1
    micro_batches: Literal[1] = 1
    shard_optimizer: Literal[False] = False


class RunSpec(Section):
    """One pretraining run."""

    seed: Annotated[Int, Field(ge=0, lt=2**63)] = 0
    backend: Literal["torch", "oneflow", "paddle"] | None = None
    """Default of --backend; null: the first installed."""
    device: Str = "auto"
    """auto, cpu, cuda or cuda:N."""
    precision: Literal["float32", "float64", "bfloat16", "float16"] = "float32"
    threads: PositiveInt | Literal["auto"] = "auto"
    """CPU threads of the framework; auto: the cores this process may use."""
    data: DataSpec = DataSpec()
    augment: AugmentSpec = AugmentSpec()
    model: VitSpec
    method: MocoV3Spec
    optim: OptimSpec = OptimSpec()
    train: TrainSpec
    log: LogSpec = LogSpec()
    checkpoint: CheckpointSpec = CheckpointSpec()
    evaluate: EvaluateSpec = EvaluateSpec()
    parallel: ParallelSpec = ParallelSpec()

    @field_validator("device")
    @classmethod
    def _device(cls, value: str) -> str:
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", value):
            raise ValueError("expected auto, cpu, cuda or cuda:N")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> "RunSpec":
        if self.data.channels != self.model.channels:
            raise KeyedError(
                "model.channels",
                f"data.channels is {self.data.channels}, model.channels {self.model.channels}: "
                "they must be equal",
            )
        for name in ("mean", "std"):
            count = len(getattr(self.augment, name))
            if count not in (1, self.model.channels):
                raise KeyedError(
                    f"augment.{name}",
                    f"{count} values for {self.model.channels} channels: give one, or one each",
                )
        if self.train.batch_size < 2:
            raise KeyedError("train.batch_size", "batch norm needs at least 2 images per batch")
        return self
