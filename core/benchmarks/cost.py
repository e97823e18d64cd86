"""Cost of one training step per image, in multiply-adds; an image has two views.

The rules are those of ``core.parameters.counts.flops``. Trained parts count three times, once
forward and twice backward. The teacher counts once. Optimizer, teacher update and augmentation are
left out.
"""

import itertools
import math
from collections.abc import Callable
from typing import cast

from triptych.core import parameters
from triptych.core.config.spec import MocaSpec, MocoV3Spec, RunSpec, VitSpec
from triptych.core.parameters.counts import block_flops, flops

COUNTED = (
    "multiply-adds of a step for one image (two views): student and heads three times, "
    "forward and backward, teacher once"
)
VIEWS = 2
TRAINED = 3
"""Passes of a trained part: forward, gradient of the input, gradient of the weights."""


def step_flops(spec: RunSpec) -> int:
    """Multiply-adds of one step, divided by the number of its images.

    Raises:
        ValueError: the method is not in ``COSTS``.
    """
    if spec.method.name not in COSTS:
        raise ValueError(f"no step cost of {spec.method.name}")
    return VIEWS * COSTS[spec.method.name](spec)


def _moco_v3(spec: RunSpec) -> int:
    method, parts = cast(MocoV3Spec, spec.method), parameters.parts(spec)
    projector, predictor = (parameters.head_flops(h) for h in (parts.projector, parts.predictor))
    logits = spec.train.batch_size * method.output_dim
    student = flops(spec) + projector + predictor + logits
    return TRAINED * student + flops(spec) + projector


def _moca(spec: RunSpec) -> int:
    model, method = cast(VitSpec, spec.model), cast(MocaSpec, spec.method)
    patches, words = math.prod(model.grid), method.words
    decoder = parameters.decoder_spec(model, method)
    embed = patches * model.channels * model.patch_size**2 * model.width
    student = 0
    for tokens in method.rounds(patches):
        student += embed + block_flops(model, 1 + tokens.visible)
        student += (1 + tokens.visible) * model.width * decoder.width
        student += block_flops(decoder, 1 + tokens.decoded)
        student += words * (model.width + tokens.decoded * decoder.width)
    generators = (
        parameters.generator_widths(model, method, out) for out in (model.width, decoder.width)
    )
    made = words * sum(map(_layers, generators))
    teacher = flops(spec) + patches * words * model.width
    # Generated weights serve all images of the step; the codes are computed for each view.
    return TRAINED * (student + made // (VIEWS * spec.train.batch_size)) + teacher


def _layers(widths: list[int]) -> int:
    return sum(math.prod(pair) for pair in itertools.pairwise(widths))


COSTS: dict[str, Callable[[RunSpec], int]] = {"moco_v3": _moco_v3, "moca": _moca}
"""Method -> multiply-adds of a step for one view of one image."""
