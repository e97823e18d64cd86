"""Classifiers under timm's and torchvision's names, and the start of a run with init.weights."""

from pathlib import Path

import numpy as np
import pytest
from support.golden_weights import official_state
from test_formats_pretrained import FINETUNE, MOCA, V1, V3, encoder_of, saved, supervised

from triptych.core import checkpoint, formats
from triptych.core.config.spec import VitSpec
from triptych.core.errors import UserError
from triptych.core.files.tree import Content, Stored
from triptych.core.formats import FORMATS
from triptych.core.formats.detection import recognise
from triptych.core.parameters import initial_state, table
from triptych.core.parity.trace import starting_state
from triptych.core.training.resume import Start, find_start

NARROW = {"width": 8, "stem": "small"}


@pytest.mark.parametrize(
    ("case", "method", "model", "names"),
    [
        (V3, None, {}, {"head.weight", "head.bias", "blocks.2.attn.qkv.weight", "norm.bias"}),
        (V1, None, NARROW, {"fc.weight", "fc.bias", "layer4.1.bn2.running_var", "conv1.weight"}),
        (MOCA, FINETUNE, {"fc_norm": True}, {"fc_norm.weight", "head.weight", "cls_token"}),
    ],
)
@pytest.mark.parametrize("wrapper", ["", "module."])
def test_a_classifier_goes_there_and_back(tmp_path, case, method, model, names, wrapper):
    spec = supervised(case, method, **model)
    state = initial_state(spec)
    arrays = FORMATS["timm" if isinstance(spec.model, VitSpec) else "torchvision"].from_canonical(
        state, spec
    )
    assert names <= arrays.keys() and len(arrays) == len(state)
    path = saved(tmp_path, {wrapper + name: array for name, array in arrays.items()})
    loaded = formats.load_weights(path, spec)
    assert list(loaded) == [param.name for param in table(spec)]
    assert all(np.array_equal(loaded[name], array) for name, array in state.items())


def test_the_average_of_the_weights_is_the_only_classifier_of_the_file(tmp_path):
    spec = supervised(V3, {**FINETUNE, "momentum": 0.9})
    arrays = {**encoder_of(V3), "head.weight": np.ones((5, 192)), "head.bias": np.ones(5)}
    loaded = formats.load_weights(saved(tmp_path, arrays), spec)
    for name in ("encoder.cls_token", "classifier.weight"):
        assert np.array_equal(loaded[f"student.{name}"], loaded[f"teacher.{name}"])
    assert loaded["teacher.classifier.weight"].sum() == 5 * 192


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"head.weight": np.ones((1000, 192))}, "misshapen student.classifier.weight: expected "
         "(5, 192), got (1000, 192)"),
        ({"head_dist.bias": np.ones(5)}, "unused head_dist.bias (5,)"),
    ],
)  # fmt: skip
def test_a_classifier_that_does_not_fit_is_named(tmp_path, change, line):
    arrays = {**encoder_of(V3), "head.weight": np.ones((5, 192)), "head.bias": np.ones(5)}
    path = saved(tmp_path, {**arrays, **change})
    with pytest.raises(UserError) as caught:
        formats.load_weights(path, supervised(V3))
    assert str(caught.value) == f"{path}: {line}"


def test_a_single_network_is_not_enough_for_pretraining(tmp_path):
    path = saved(tmp_path, encoder_of(V3))
    with pytest.raises(UserError, match=r"moco_v3: the file holds a ViT encoder .* linear"):
        formats.load_weights(path, supervised(V3, {"name": "moco_v3"}))


@pytest.mark.parametrize(("case", "name"), [(V1, "moco"), (V3, "moco_v3"), (MOCA, "moca")])
def test_files_of_other_formats_are_not_taken_for_a_single_network(case, name):
    tree = {key: Stored.of(array) for key, array in official_state(case).items()}
    source = recognise(Content(Path("w.npz"), "npz", tree))
    assert source.format.name == name and not source.renamed.unknown


# -------------------------------------------------------------------------- where a run begins


def test_a_run_reads_the_weights_once(tmp_path):
    path = saved(tmp_path, encoder_of(V3))
    spec = supervised(V3, init={"weights": str(path)})
    stamp = {"versions": {}, "backend": "torch", "threads": 1, "data": "", "compute": {}}
    lines = []
    start, state = find_start(spec, tmp_path / "run", None, stamp, lines.append)
    assert start == Start() and len(lines) == 1 and str(path) in lines[0]
    token = encoder_of(V3)["cls_token"]
    assert np.array_equal(state["student.encoder.cls_token"], token)
    assert np.array_equal(starting_state(spec, None)["student.encoder.cls_token"], token)

    trained = {**state, "student.encoder.cls_token": token + 1}
    checkpoint.write(tmp_path / "run", 1, trained, spec, {"backend": "torch"}, keep=1)
    path.unlink()
    start, state = find_start(spec, tmp_path / "run", "auto", stamp, lines.append)
    assert start.step == 1
    assert np.array_equal(state["student.encoder.cls_token"], token + 1)
    with pytest.raises(UserError, match=r"weights.npz: no such file"):
        find_start(spec, tmp_path / "other", None, stamp, lines.append)
