"""The ``parallel`` section: how many processes a run has, and what each of them has of it."""

from collections.abc import Iterator

from triptych.core.config.fields import Bool, KeyedError, PositiveInt, Section
from triptych.core.config.method import AnyMethodSpec, MocaSpec, MocoV2Spec, MocoV3Spec
from triptych.core.config.model import ModelSpec, VitSpec


class ParallelSpec(Section):
    """Degrees of parallelism. Data, tensor and pipeline multiply to the number of processes. A
    backend refuses what it does not implement."""

    data: PositiveInt = 1
    """Number of copies of the model. Each has a part of the images of a batch."""
    tensor: PositiveInt = 1
    """Number of processes that share the matrices of each copy of a ViT and of its heads."""
    pipeline: PositiveInt = 1
    """Number of processes that share the blocks of each copy of a ViT."""
    micro_batches: PositiveInt = 1
    """Number of parts of a copy's images that are in the pipeline at the same time."""
    shard_optimizer: Bool = False
    """Whether each copy of the model has a part of the optimizer's state only."""
    recompute: Bool = False
    """Whether the backward pass computes the activations of each block of the encoder, a ViT, again
    instead of keeping them. It needs less memory and more time."""

    def contradictions(self) -> Iterator[KeyedError]:
        """Reports what has no effect."""
        if self.pipeline == 1 and self.micro_batches > 1:
            yield KeyedError(
                "micro_batches",
                f"{self.micro_batches}: a pipeline of one stage has none; train.accumulate "
                "divides its batch",
            )
        if self.shard_optimizer and self.data == 1:
            yield KeyedError("shard_optimizer", "one copy of the model has nothing to share")


def parallel_contradictions(
    parallel: ParallelSpec, batch_size: int, accumulate: int, virtual_ranks: int
) -> Iterator[KeyedError]:
    """The contradictions between degrees and batch."""
    parts = parallel.data * accumulate * parallel.micro_batches
    if batch_size % parts and parts != accumulate:
        copies = parallel.data * accumulate
        yield KeyedError(
            "parallel.data" if batch_size % copies else "parallel.micro_batches",
            f"train.batch_size {batch_size} is not divisible by data {parallel.data} x accumulate "
            f"{accumulate} x micro_batches {parallel.micro_batches} = {parts}",
        )
    if parallel.data % virtual_ranks and virtual_ranks % parallel.data:
        yield KeyedError(
            "parallel.data",
            f"{parallel.data} copies do not divide {virtual_ranks} batch_norm.virtual_ranks, nor "
            "these the copies",
        )


def architecture_contradictions(
    parallel: ParallelSpec, model: ModelSpec, method: AnyMethodSpec
) -> Iterator[KeyedError]:
    """The contradictions between degrees and architecture."""
    if not isinstance(model, VitSpec):
        for key in ("tensor", "pipeline"):
            if getattr(parallel, key) > 1:
                yield KeyedError(
                    f"parallel.{key}",
                    f"{getattr(parallel, key)}: only a ViT is divided; {model.name} needs 1",
                )
        if parallel.recompute:
            yield KeyedError("parallel.recompute", f"only a ViT has blocks, not {model.name}")
        return
    for key, size in _divided(model, method):
        if size % parallel.tensor:
            yield KeyedError(
                "parallel.tensor", f"{key} {size} is not divisible by {parallel.tensor}"
            )
    if parallel.pipeline > model.depth:
        yield KeyedError(
            "parallel.pipeline", f"{parallel.pipeline} stages, but model.depth {model.depth} blocks"
        )


def _divided(model: VitSpec, method: AnyMethodSpec) -> Iterator[tuple[str, int]]:
    """Key and value of each number that tensor parallelism divides (``core.parallel.sharding``)."""
    yield "model.heads", model.heads
    yield "the hidden width of the MLPs", model.mlp_width
    if isinstance(method, MocoV3Spec):
        yield "method.hidden_dim", method.hidden_dim
        yield "method.predictor_hidden_dim", method.predictor_hidden_dim or method.hidden_dim
    if isinstance(method, MocoV2Spec):
        yield "method.hidden_dim", method.hidden_dim or model.features
    if isinstance(method, MocaSpec):
        yield "method.decoder_heads", method.decoder_heads
        decoder = model.model_copy(update={"width": method.decoder_width})
        yield "the hidden width of the decoder's MLPs", decoder.mlp_width
        hidden = int(model.width * method.predictor_ratio)
        yield "the hidden width of the weight generators", hidden
