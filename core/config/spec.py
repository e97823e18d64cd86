"""The run spec: all keys that a YAML file may have, with their types, bounds and meanings.

Attribute docstrings become the descriptions in ``configs/schema.json``. A spec is frozen. Values
derived from it (peak learning rate, steps per epoch, parameter table) belong to the modules that
use them.
"""

import re
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, field_validator

from triptych.core.config.augment import (
    AugmentOp,
    AugmentSpec,
    ColorJitter,
    GaussianBlur,
    Grayscale,
    HorizontalFlip,
    Op,
    RandAugment,
    RandomAffine,
    RandomErase,
    RandomResizedCrop,
    Solarize,
    augment_contradictions,
)
from triptych.core.config.data import DataSpec
from triptych.core.config.evaluate import EvaluateSpec
from triptych.core.config.fields import (
    Bool,
    Int,
    KeyedError,
    NonNegativeInt,
    PositiveInt,
    Section,
    Str,
    Threads,
)
from triptych.core.config.init import InitSpec
from triptych.core.config.method import (
    AnyMethodSpec,
    FinetuneSpec,
    LinearSpec,
    MethodSpec,
    MocaSpec,
    MocoV1Spec,
    MocoV2Spec,
    MocoV3Spec,
    Probe,
    QueueSpec,
    SupervisedSpec,
    TeacherStatistics,
)
from triptych.core.config.moca import moca_contradictions
from triptych.core.config.model import (
    RESNET_PRESETS,
    VIT_PRESETS,
    EncoderSpec,
    ModelSpec,
    ResnetSpec,
    VitSpec,
)
from triptych.core.config.optim import (
    AdamWSpec,
    AnyOptimSpec,
    LarsSpec,
    OptimSpec,
    SgdSpec,
    layer_decay_contradictions,
)
from triptych.core.config.parallel import (
    ParallelSpec,
    architecture_contradictions,
    parallel_contradictions,
)
from triptych.core.config.supervised import supervised_contradictions

__all__ = [
    "DEVICES",
    "RESNET_PRESETS",
    "VIT_PRESETS",
    "AdamWSpec",
    "AnyMethodSpec",
    "AnyOptimSpec",
    "AugmentOp",
    "AugmentSpec",
    "BatchNormSpec",
    "CheckpointSpec",
    "ColorJitter",
    "DataSpec",
    "EncoderSpec",
    "EvaluateSpec",
    "FinetuneSpec",
    "GaussianBlur",
    "Grayscale",
    "HorizontalFlip",
    "InitSpec",
    "KeyedError",
    "LarsSpec",
    "LinearSpec",
    "LogSpec",
    "MethodSpec",
    "MocaSpec",
    "MocoV1Spec",
    "MocoV2Spec",
    "MocoV3Spec",
    "ModelSpec",
    "Op",
    "OptimSpec",
    "ParallelSpec",
    "Probe",
    "QueueSpec",
    "RandAugment",
    "RandomAffine",
    "RandomErase",
    "RandomResizedCrop",
    "ResnetSpec",
    "RunSpec",
    "Section",
    "SgdSpec",
    "Solarize",
    "SupervisedSpec",
    "TeacherStatistics",
    "TrainSpec",
    "VitSpec",
]


DEVICES = r"auto|cpu|cuda(:[0-9]+)?"
"""Pattern of the names that a spec or an environment may give a device."""


class BatchNormSpec(Section):
    """The statistics of batch norms."""

    virtual_ranks: PositiveInt = 1
    """Number of contiguous parts of the batch that are normalised separately, as on that many
    devices without synchronised batch norm. The running statistics are those of the first part. 1:
    the whole batch is one part."""
    running_variance: Literal["unbiased", "biased"] = "unbiased"
    """The variance of a batch that enters the running variance, with n values of a channel.
    unbiased: divided by n - 1 (PyTorch, OneFlow). biased: divided by n (Paddle on the CPU). A
    batch in training is always normalised with the biased variance."""


class TrainSpec(Section):
    """Length of the run and size of the batch."""

    epochs: PositiveInt | None = None
    steps: PositiveInt | None = None
    """Length of the run in steps. Give exactly one of epochs and steps."""
    batch_size: PositiveInt = 256
    """Global batch size: images per optimizer step over all ranks."""
    accumulate: PositiveInt = 1
    """Number of micro-batches whose gradients a step adds up. They need less memory and change no
    number: teacher, queue and codebook move once in a step. An encoder with batch norm needs
    batch_norm.virtual_ranks, so that each micro-batch holds whole virtual ranks."""
    drop_last: Bool = True
    """Whether the images left over at the end of an epoch are left out. false: they make a last,
    smaller batch."""
    compile: Bool | Literal["auto"] = "auto"
    """Whether the framework compiles encoders and heads: fewer, larger kernels, after minutes of
    compilation. The last digits may change. PyTorch alone can. auto: on a GPU, unless tensor or
    pipeline parallelism divides the networks."""
    stop_at: PositiveInt | None = None
    """Step after which the run ends with a checkpoint. It changes no schedule."""

    def steps_per_epoch(self, images: int) -> int:
        """Number of batches in one pass over ``images`` images."""
        return images // self.batch_size if self.drop_last else -(-images // self.batch_size)

    def contradictions(self) -> Iterator[KeyedError]:
        """Reports no length, two lengths, and a batch that is too small for batch norm."""
        if self.epochs is None and self.steps is None:
            yield KeyedError("steps", "give exactly one of train.epochs and train.steps")
        if self.epochs is not None and self.steps is not None:
            yield KeyedError(
                "steps",
                f"train.epochs is {self.epochs} and train.steps {self.steps}: "
                "set one of them to null",
            )
        if self.batch_size < 2:
            yield KeyedError("batch_size", "batch norm needs at least 2 images per batch")


class LogSpec(Section):
    """Logging during training."""

    every: PositiveInt = 10
    """Steps between log lines."""
    tensorboard: Bool = True
    """Whether to write TensorBoard files."""


class CheckpointSpec(Section):
    """Checkpoints during training."""

    every: NonNegativeInt = 1000
    """Steps between checkpoints. 0: only at the end (and on a signal)."""
    keep: PositiveInt = 3
    """Number of newest checkpoints to keep."""
    background: Bool = False
    """Whether a checkpoint during training is written while the next steps are computed. That takes
    memory for a copy of the state in the main process."""


class RunSpec(Section):
    """One run: pretraining, a linear probe or fine-tuning."""

    seed: Annotated[Int, Field(ge=0, lt=2**63)] = 0
    backend: Literal["torch", "oneflow", "paddle"] | None = None
    """Backend unless --backend is given; null: the first one installed."""
    device: Str = "auto"
    """auto, cpu, cuda or cuda:N."""
    precision: Literal["float32", "float64", "tf32", "bfloat16", "float16"] = "float32"
    """Precision of the computation. State and checkpoints are float64 for float64, else float32.
    tf32: float32 with ten bits of fraction in matrix products and convolutions, on a GPU only. No
    other setting uses tf32. bfloat16, float16: PyTorch, and in bfloat16 on a GPU Paddle, compute
    the networks in 16 bits, in float16 with a scaled loss."""
    deterministic: Bool = True
    """Whether to use only kernels on a GPU that give the same bits each time. This covers PyTorch,
    and Paddle where it has such kernels. Attention and convolutions may be slower. The CPU is
    always deterministic."""
    threads: Threads | Literal["auto"] = "auto"
    """Number of CPU threads of the framework; auto: the cores that this process may use."""
    data: DataSpec = DataSpec()
    augment: AugmentSpec = AugmentSpec()
    model: ModelSpec
    init: InitSpec = InitSpec()
    batch_norm: BatchNormSpec = BatchNormSpec()
    method: MethodSpec
    optim: AnyOptimSpec = AdamWSpec()
    train: TrainSpec
    log: LogSpec = LogSpec()
    checkpoint: CheckpointSpec = CheckpointSpec()
    evaluate: EvaluateSpec = EvaluateSpec()
    parallel: ParallelSpec = ParallelSpec()

    @field_validator("device")
    @classmethod
    def _device(cls, value: str) -> str:
        if not re.fullmatch(DEVICES, value):
            raise ValueError("expected auto, cpu, cuda or cuda:N")
        return value

    def contradictions(self) -> Iterator[KeyedError]:
        """The contradictions between sections."""
        channels = self.model.channels
        if self.data.channels != channels:
            yield KeyedError(
                "model.channels",
                f"data.channels is {self.data.channels}, model.channels {channels}: "
                "they must be equal",
            )
        yield from augment_contradictions(
            self.augment,
            channels,
            self.method.views,
            self.train.batch_size,
            mixes=isinstance(self.method, FinetuneSpec),
        )
        yield from self._schedule_contradictions()
        yield from self._batch_contradictions()
        train = self.train
        yield from supervised_contradictions(
            self.model, self.method, train.batch_size, drop_last=train.drop_last
        )
        if isinstance(self.method, MocaSpec):
            yield from moca_contradictions(self.model, self.method, self.train.batch_size)
        elif isinstance(self.optim, AdamWSpec) and self.optim.generator_lr is not None:
            yield KeyedError(
                "optim.generator_lr", f"method {self.method.name} has no weight generators"
            )
        yield from layer_decay_contradictions(self.optim, self.model)
        yield from parallel_contradictions(
            self.parallel, train.batch_size, train.accumulate, self.batch_norm.virtual_ranks
        )
        yield from architecture_contradictions(self.parallel, self.model, self.method)
        if self.evaluate.every and self.data.lacks_held_out:
            yield KeyedError(
                "evaluate.every",
                f"an evaluation needs {self.data.held_out_key}, the held-out images; or set 0: "
                "never",
            )

    def _schedule_contradictions(self) -> Iterator[KeyedError]:
        for unit in ("epochs", "steps"):
            warmup, length = getattr(self.optim, f"warmup_{unit}"), getattr(self.train, unit)
            if warmup is not None and length is not None and warmup > length:
                yield KeyedError(
                    f"optim.warmup_{unit}",
                    f"a warm-up of {warmup:g} {unit} is longer than the run of {length} {unit}; "
                    "shorten it or train longer",
                )
            last = max(self.optim.milestones, default=0.0)
            if length is not None and last >= length:
                yield KeyedError(
                    "optim.milestones",
                    f"{last:g} is not before the end of the run of {length} {unit}",
                )

    def _accumulation_contradictions(self) -> Iterator[KeyedError]:
        count, batch = self.train.accumulate, self.train.batch_size
        ranks = self.batch_norm.virtual_ranks
        reason = None
        if batch % count:
            reason = f"train.batch_size {batch} is not divisible by {count}"
        elif count > 1 and ranks == 1 and self._batch_norm:
            reason = (
                f"{count}: the batch norms of {self.model.name} need the whole batch at once; "
                "set it to 1"
            )
        elif ranks % count and self._batch_norm:
            reason = (
                f"{count}: batch_norm.virtual_ranks {ranks} is not divisible by {count}, and a "
                "micro-batch holds whole virtual ranks"
            )
        elif count > 1 and ranks % (count * self.parallel.data) and self._batch_norm:
            reason = (
                f"{count}: batch_norm.virtual_ranks {ranks} is not divisible by parallel.data "
                f"{self.parallel.data} x accumulate {count}, and a micro-batch holds whole virtual "
                "ranks"
            )
        if reason is not None:
            yield KeyedError("train.accumulate", reason)

    @property
    def _batch_norm(self) -> bool:
        """Whether the encoder is trained and has batch norms."""
        frozen = isinstance(self.method, LinearSpec)
        return not frozen and (isinstance(self.model, ResnetSpec) or self.model.stem == "conv")

    def _batch_contradictions(self) -> Iterator[KeyedError]:
        yield from self._accumulation_contradictions()
        batch, ranks = self.train.batch_size, self.batch_norm.virtual_ranks
        if ranks > 1 and isinstance(self.method, MocaSpec):
            yield KeyedError(
                "batch_norm.virtual_ranks",
                f"{ranks}: MOCA's batch norm is over words, which no device divides; leave it at 1 "
                "(method.word_ranks is how many devices feed the codebook)",
            )
        if batch % ranks:
            yield KeyedError(
                "batch_norm.virtual_ranks",
                f"train.batch_size {batch} is not divisible by {ranks}",
            )
        elif batch == ranks > 1:
            yield KeyedError(
                "batch_norm.virtual_ranks",
                f"{ranks} parts of a batch of {batch} hold one image each; batch norm needs 2",
            )
        if isinstance(self.method, QueueSpec) and self.method.queue_size < batch:
            yield KeyedError(
                "method.queue_size",
                f"{self.method.queue_size}: smaller than train.batch_size {batch}, so a step's "
                "keys would overwrite each other",
            )
