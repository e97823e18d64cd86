"""The counted cost of a step, against counts by hand."""

import pytest

from triptych.core import config
from triptych.core.benchmarks.cost import step_flops
from triptych.core.benchmarks.step import DEFAULTS, moco_v3_twin
from triptych.core.parameters.counts import flops


def block(tokens, width):
    """Attention and MLP of ratio 4, and two layer norms."""
    return 12 * tokens * width**2 + 2 * tokens**2 * width + 10 * tokens * width


def test_moco_v3_by_hand():
    spec = config.load("moco_v3/vit_small", DEFAULTS)
    projector = 384 * 4096 + 4096 * 4096 + 4096 * 256
    predictor = 256 * 4096 + 4096 * 256
    student = flops(spec) + projector + predictor + 8 * 256
    assert step_flops(spec) == 2 * (3 * student + flops(spec) + projector)


def test_moca_by_hand():
    spec = config.load("moca/vit_small", DEFAULTS)
    student = 0
    for visible, decoded in ((88, 127), (49, 88)):
        student += 196 * 3 * 256 * 384 + 12 * block(1 + visible, 384) + 5 * (1 + visible) * 384
        student += (1 + visible) * 384 * 512
        student += 2 * block(1 + decoded, 512) + 5 * (1 + decoded) * 512
        student += 4096 * (384 + decoded * 512)
    image, dense = 384 * 768 + 768 * 384, 384 * 768 + 768 * 512
    student += 4096 * (image + dense) // 16
    assert step_flops(spec) == 2 * (3 * student + flops(spec) + 196 * 4096 * 384)


def test_the_twin_has_the_same_encoder_and_batch():
    spec = config.load("moca/vit_small", [*DEFAULTS, "model.image_size=112", "precision=float64"])
    twin = moco_v3_twin(spec)
    assert twin.method.name == "moco_v3" and flops(twin) == flops(spec)
    assert (twin.train.batch_size, twin.precision) == (8, "float64")


def test_other_methods_have_none():
    with pytest.raises(ValueError, match="moco_v2"):
        step_flops(config.load("moco_v2/resnet50"))
