"""The architecture of a file, as its tensors and the caller tell it."""

import numpy as np
import pytest
from conftest import assert_close
from support.golden_replay import spec_file
from support.golden_weights import official_state
from test_formats_pretrained import MOCA, V3, encoder_of, saved

from triptych.core import config, formats, get_model, launch
from triptych.core.errors import UserError
from triptych.core.files.saving import write
from triptych.core.files.tree import Stored
from triptych.core.formats.conversion import Request, plan


@pytest.mark.parametrize(
    ("case", "heads", "shown"),
    [
        (V3, 3, {"model": ("width", "depth", "patch_size", "image_size", "mlp_ratio", "stem"),
                 "method": ("hidden_dim", "output_dim", "projector_layers", "predictor_layers")}),
        (MOCA, 4, {"model": ("width", "depth", "patch_size", "image_size"),
                   "method": ("words", "predictor_ratio", "decoder_width", "decoder_depth")}),
    ],
)  # fmt: skip
def test_shapes_show_the_architecture(tmp_path, case, heads, shown):
    path = saved(tmp_path, official_state(case))
    known = config.load(spec_file(case))
    overrides = [f"model.heads={heads}"]
    overrides += [f"method.decoder_heads={known.method.decoder_heads}"] if case == MOCA else []
    spec = formats.read_spec(path, overrides)
    for section, keys in shown.items():
        ours, theirs = getattr(spec, section), getattr(known, section)
        assert {k: getattr(ours, k) for k in keys} == {k: getattr(theirs, k) for k in keys}
    assert list(formats.load_weights(path, spec)) == list(formats.load_weights(path, known))


def test_what_no_shape_shows_is_asked_for_by_name(tmp_path):
    path = saved(tmp_path, encoder_of(V3))
    with pytest.raises(UserError) as caught:
        formats.read_spec(path)
    assert str(caught.value) == (
        f"{path}: timm: the file does not say model.heads; give -c SPEC or -o model.heads=NUMBER"
    )


def test_a_file_alone_makes_an_encoder(backend, backend_name, tmp_path):
    arrays = encoder_of(V3)
    path = saved(tmp_path, arrays)
    model = get_model(
        weights=path, backend=backend_name, overrides=["model.heads=3", "precision=float64"]
    )
    spec = model.spec
    images = np.random.default_rng(0).standard_normal((2, 3, *spec.model.size))
    state = formats.load_encoders(path, spec)
    want = launch.open_encoder(spec, launch.REFERENCE, state, "student").embed(images)["final"]
    assert_close(model.encode(images), want, 1e-12)
    with pytest.raises(UserError, match=r"teacher: .* holds no such encoder"):
        model.encode(images, branch="teacher")


def test_a_resnet_that_was_cut_is_one_line(tmp_path):
    shapes = {"conv1.weight": (4, 3, 7, 7), "bn1.weight": (4,), "layer1.0.conv1.weight": (4,) * 4}
    write(tmp_path / "x.pth", {n: Stored.of(np.ones(s)) for n, s in shapes.items()}, "torch")
    with pytest.raises(UserError) as error:
        plan(tmp_path / "x.pth", Request("timm"))
    reason = "a ResNet without tensors of layer2, layer3, layer4; give a file of the whole encoder"
    assert str(error.value).endswith(reason) and "\n" not in str(error.value)
