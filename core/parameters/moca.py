"""The tensors that MOCA adds to its encoders: decoder, weight generators, codebook."""

from triptych.core.config.spec import MocaSpec, VitSpec
from triptych.core.parameters.param import (
    COUNT,
    ZEROS,
    Init,
    Param,
    batch_norm,
    linear,
    norm,
    prefixed,
    xavier,
)
from triptych.core.parameters.vit import block_params, position_param

GENERATORS = ("student.image_predictor.", "student.dense_predictor.")
"""Prefixes of the weight generators: the networks that compute the predictors' weights."""


def decoder_spec(model: VitSpec, method: MocaSpec) -> VitSpec:
    """The spec of a ViT with the decoder's blocks and positions."""
    size = {"width": method.decoder_width, "depth": method.decoder_depth}
    fixed = {"freeze_positions": True}
    return model.model_copy(update={**size, "heads": method.decoder_heads, **fixed})


def generator_widths(model: VitSpec, method: MocaSpec, out: int) -> list[int]:
    """Widths of a weight generator: of a word, the hidden layer and a predictor's weight."""
    return [model.width, int(model.width * method.predictor_ratio), out]


def moca_params(model: VitSpec, method: MocaSpec) -> list[Param]:
    """The student's tensors after the encoder, in forward order."""
    decoder = decoder_spec(model, method)
    token = Param("mask_token", (1, 1, decoder.width), Init("normal", 0.02))
    embed = linear("embed", model.width, decoder.width, xavier(model.width, decoder.width))
    return [
        *prefixed("image_predictor.", _generator(model, method, model.width)),
        *prefixed(
            "decoder.",
            [
                token,
                position_param(decoder),
                *norm("early_norm", model.width),
                *embed,
                *block_params(decoder),
                *norm("norm", decoder.width),
            ],
        ),
        *prefixed("dense_predictor.", _generator(model, method, decoder.width)),
    ]


def codebook(model: VitSpec, method: MocaSpec) -> list[Param]:
    """The tensors of the codebook.

    Their names:
        ``words``: the visual words, one in each row.
        ``distance``, ``distance_used``: the running means that set the temperature of the codes.
        ``pointer``: the row for the next word.
        ``updates``: the number of updates done.
    """
    half = Init("constant", 0.5)
    tensors = (
        ("words", (method.words, model.width), Init("positive_rows")),
        ("distance", (1,), half),
        ("distance_used", (1,), half),
        ("pointer", (), COUNT),
        ("updates", (), COUNT),
    )
    return [Param(name, s, i, trainable=False, buffer=True) for name, s, i in tensors]


def _generator(model: VitSpec, method: MocaSpec, out: int) -> list[Param]:
    width, hidden, out = generator_widths(model, method, out)
    skip = linear("skip", width, out, xavier(width, out)) if out != width else []
    return [
        Param("scale", (1,), Init("constant", method.kappa), trainable=False),
        *linear("hidden", width, hidden, xavier(width, hidden), None),
        *batch_norm("norm", hidden),
        *linear("last", hidden, out, xavier(hidden, out), ZEROS),
        *skip,
    ]
