"""The requirements of linear probe and fine-tuning on the model."""

from collections.abc import Iterator

from triptych.core.config.fields import KeyedError
from triptych.core.config.method import AnyMethodSpec, FinetuneSpec, LinearSpec
from triptych.core.config.mixing import mixing_contradictions
from triptych.core.config.model import ModelSpec, VitSpec


def supervised_contradictions(
    model: ModelSpec, method: AnyMethodSpec, batch_size: int, *, drop_last: bool
) -> Iterator[KeyedError]:
    """The contradictions between method, model and batch, each at the key that should change."""
    pools_mean = isinstance(method, FinetuneSpec) and method.pooling == "mean"
    if isinstance(model, VitSpec) and model.fc_norm and not pools_mean:
        yield KeyedError("model.fc_norm", "only for method finetune with method.pooling mean")
    if isinstance(method, LinearSpec):
        yield from _linear(model, method)
    if isinstance(method, FinetuneSpec):
        yield from _finetune(model, method, drop_last=drop_last)
        yield from mixing_contradictions(method.mixing, batch_size)


def _linear(model: ModelSpec, method: LinearSpec) -> Iterator[KeyedError]:
    depth = model.depth if isinstance(model, VitSpec) else 1
    if method.blocks > depth:
        of = f"the model has {depth} blocks" if isinstance(model, VitSpec) else "a ResNet has one"
        yield KeyedError("method.blocks", f"{method.blocks}: {of}")
    if method.pooling == "both" and not isinstance(model, VitSpec):
        yield KeyedError("method.pooling", "both: a ResNet has no class token; use cls")
    if method.pooling == "mean" and method.blocks > 1:
        yield KeyedError("method.blocks", "pooling mean is of the last block; use cls or both")


def _finetune(model: ModelSpec, method: FinetuneSpec, *, drop_last: bool) -> Iterator[KeyedError]:
    if not isinstance(model, VitSpec) and method.drop_path:
        yield KeyedError("method.drop_path", f"{model.name} has no drop-path; a ViT has")
    if method.mixing.mixes and method.mixing.partner == "reversed" and not drop_last:
        yield KeyedError(
            "train.drop_last",
            "false: method.mixing pairs the images of whole batches; set it to true, or "
            "method.mixing.partner to permuted",
        )
