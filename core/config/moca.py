"""The requirements of MOCA's masks, words and layers on the model and the batch."""

from collections.abc import Iterator

from triptych.core.config.fields import KeyedError
from triptych.core.config.method import MocaSpec
from triptych.core.config.model import ModelSpec, VitSpec


def moca_contradictions(
    model: ModelSpec, method: MocaSpec, batch_size: int
) -> Iterator[KeyedError]:
    """The contradictions between MOCA, model and batch, each at the key that should change."""
    if not isinstance(model, VitSpec) or model.stem != "patch":
        yield KeyedError("model.name", "method moca masks patches: it needs a ViT, stem patch")
        return
    if method.early_layer >= model.depth:
        yield KeyedError(
            "method.early_layer", f"{method.early_layer}: the model has {model.depth} blocks"
        )
    if int(model.width * method.predictor_ratio) < 1:
        yield KeyedError(
            "method.predictor_ratio",
            f"{method.predictor_ratio:g} of the model's width {model.width} leaves no hidden unit",
        )
    if min(model.grid) <= 2 * method.border:
        rows, columns = model.grid
        yield KeyedError(
            "method.border",
            f"{method.border} rows and columns at each edge leave nothing of a grid of "
            f"{rows} x {columns} tokens",
        )
    yield from _masks(model, method)
    images = method.word_images(batch_size)
    if batch_size % method.word_ranks:
        yield KeyedError(
            "method.word_ranks",
            f"train.batch_size {batch_size} is not divisible by {method.word_ranks}",
        )
    elif images < method.step_words:
        yield KeyedError(
            "method.new_words",
            f"{method.step_words} words for each step, but only {images} images to take them from",
        )


def _masks(model: VitSpec, method: MocaSpec) -> Iterator[KeyedError]:
    length = model.grid[0] * model.grid[1]
    rounds = method.rounds(length)
    for i, (visible, decoded) in enumerate(rounds, 1):
        if not 0 < visible < decoded:
            key = "mask_ratios" if visible == 0 else "decoder_ratios"
            yield KeyedError(
                f"method.{key}",
                f"round {i} shows {visible} of {length} tokens and decodes {decoded}: "
                "expected at least one shown, and more decoded",
            )
    left = length - rounds[0].decoded
    if left < rounds[1].visible:
        yield KeyedError(
            "method.mask_ratios",
            f"round 2 shows {rounds[1].visible} tokens, but round 1 decodes all but {left} of "
            f"{length}: the two would overlap",
        )
