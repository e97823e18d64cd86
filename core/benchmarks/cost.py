"""What one training step costs, in multiply-adds of one image with its two views.

Counted as ``core.parameters.counts.flops`` counts. What is trained counts three times, once
forward and twice backward; the teacher once. Optimizer, teacher update and augmentation are left
out.
"""

import itertools
import math
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
"""Forward, gradient of the input, gradient of the weights."""


def step_flops(spec: RunSpec) -> int:
    """Multiply-adds of one step divided by its images.

    Raises:
        ValueError: the method is not one of MoCo v3 and MOCA.
    """
    method = spec.method
    if isinstance(method, MocaSpec):
        return VIEWS * _moca(spec, cast(VitSpec, spec.model), method)
    if isinstance(method, MocoV3Spec):
        return VIEWS * _moco_v3(spec, method)
    raise ValueError(f"no step cost of {method.name}")


def _moco_v3(spec: RunSpec, method: MocoV3Spec) -> int:
    hidden, out = method.hidden_dim, method.output_dim
    projector = [spec.model.features, *[hidden] * (method.projector_layers - 1), out]
    predictor = [out, *[hidden] * (method.predictor_layers - 1), out]
    logits = spec.train.batch_size * out
    student = flops(spec) + _layers(projector) + _layers(predictor) + logits
    return TRAINED * student + flops(spec) + _layers(projector)


def _moca(spec: RunSpec, model: VitSpec, method: MocaSpec) -> int:
    patches, words = math.prod(model.grid), method.words
    decoder = parameters.decoder_spec(model, method)
    embed = patches * model.channels * model.patch_size**2 * model.width
    student = 0
    for one in method.rounds(patches):
        student += embed + block_flops(model, 1 + one.visible)
        student += (1 + one.visible) * model.width * decoder.width
        student += block_flops(decoder, 1 + one.decoded)
        student += words * (model.width + one.decoded * decoder.width)
    generators = (
        parameters.generator_widths(model, method, out) for out in (model.width, decoder.width)
    )
    made = words * sum(map(_layers, generators))
    teacher = flops(spec) + patches * words * model.width
    # The weights are made once for all images of the step, the codes once for each view.
    return TRAINED * (student + made // (VIEWS * spec.train.batch_size)) + teacher


def _layers(widths: list[int]) -> int:
    return sum(math.prod(pair) for pair in itertools.pairwise(widths))
