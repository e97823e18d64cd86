"""What is special about Paddle's files: generated names, no counters of batches, nested tuples."""

import re
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from support import foreign
from support.resuming import written

from triptych.core import formats
from triptych.core.config.spec import InitSpec
from triptych.core.errors import UserError
from triptych.core.files import reading
from triptych.core.files.saving import write
from triptych.core.files.tree import Content, Stored
from triptych.core.formats import plsc
from triptych.core.formats.detection import recognise
from triptych.core.formats.format import Output
from triptych.core.formats.pretrained import read_encoder
from triptych.core.formats.specs import spec_of
from triptych.core.formats.unique import named
from triptych.core.parameters import encoder

FLEETX, PLSC, VISION = (
    "paddlefleetx_moco_v2_bottleneck",
    "plsc_moco_v3_vit.pd",
    "paddle_resnet18_adamw",
)


def generated(tensors: dict[str, Stored]) -> dict[str, tuple[str, int, str]]:
    """Class, number and end of each generated name, by name in the file."""
    matches = {n: re.fullmatch(r"([^.]+)_(\d+)(.*)", t.unique) for n, t in tensors.items()}
    return {name: (m[1], int(m[2]), m[3]) for name, m in matches.items() if m}


@pytest.mark.parametrize("file", [FLEETX, VISION])
def test_generated_names_are_those_of_a_process_that_builds_one_model(
    file: str, tmp_path: Path
) -> None:
    tensors = foreign.source_of(file, tmp_path).place.tensors
    made = generated(named(tensors))
    assert made == generated(tensors) and len(made) == len(tensors)


def test_a_replaced_layer_has_a_number(tmp_path: Path) -> None:
    """PLSC gives each branch a classifier, and builds the heads in its place later."""
    tensors = foreign.source_of(PLSC, tmp_path).place.tensors
    made, theirs = generated(named(tensors, plsc.built(tensors), plsc.ROOT)), generated(tensors)
    shifts = defaultdict(set)
    for name, (kind, number, end) in made.items():
        assert (kind, end) == (theirs[name][0], theirs[name][2])
        shifts[kind].add(theirs[name][1] - number)
    # The process that wrote the file had built other models before.
    assert len(made) == len(tensors) and all(len(shift) == 1 for shift in shifts.values())
    assert shifts["linear"] == {7} and shifts["layer_norm"] == {0}


@pytest.mark.parametrize("file", [FLEETX, PLSC])
def test_counters_of_batches_begin_at_0_and_are_named(file: str, tmp_path: Path) -> None:
    source = foreign.source_of(file, tmp_path)
    spec = foreign.spec_of_source(file, source)
    state = formats.load_weights(source.content.path, spec)
    counters = {name for name in state if name.endswith("num_batches_tracked")}
    assert counters == source.fresh.keys() and len(counters) > 7
    assert all(state[n].dtype == np.int64 and state[n] == 0 for n in counters)
    state |= {name: np.array(5) for name in counters}
    back = source.format.from_canonical(state, spec)
    assert back.keys() == source.place.tensors.keys()


def test_the_counters_of_an_encoder_stand_among_its_initial_values(tmp_path: Path) -> None:
    source = foreign.source_of(FLEETX, tmp_path)
    spec = foreign.spec_of_source(FLEETX, source)
    path = source.content.path
    line = read_encoder(path, spec, InitSpec()).line(path, {})
    assert "initial values: student.encoder.bn1.num_batches_tracked, student.encoder.layer1" in line


def test_an_evaluation_gets_the_counters_of_the_encoder_too(tmp_path: Path) -> None:
    source = foreign.source_of(FLEETX, tmp_path)
    spec = foreign.spec_of_source(FLEETX, source)
    state = formats.load_encoders(source.content.path, spec)
    names = [param.name for param in encoder(spec.model)]
    assert state.keys() == {f"{of}.encoder.{n}" for of in ("student", "teacher") for n in names}


@pytest.mark.parametrize("file", [FLEETX, PLSC, "plsc_lincls_vit.pd", VISION])
def test_the_own_loader_opens_what_is_written(
    backend: object, backend_name: str, file: str, tmp_path: Path
) -> None:
    source = recognise(foreign.content_of(file, tmp_path), facts={"model.heads": 3})
    heads = ["model.heads=3"] if source.layout.encoder == "vit" else []
    spec = spec_of(source, heads)
    back, _ = source.layout.table.from_canonical(source.tensors, source.facts)
    container, tree = source.format.output(Output(source.layout, back, {}, spec, step=2))
    write(tmp_path / "w", tree, container)
    again = recognise(reading.read(tmp_path / "w"), facts={"model.heads": 3})
    assert (again.format, again.layout) == (source.format, source.layout)
    assert again.place.tensors.keys() == source.place.tensors.keys()
    for name, tensor in source.place.tensors.items():
        assert np.array_equal(again.place.tensors[name].bits(), tensor.bits())
        assert again.place.tensors[name].unique
    if backend_name == "paddle":
        import paddle

        file = tmp_path / "w" / "model.pdparams"
        loaded = paddle.load(str(file if file.exists() else tmp_path / "w"))
        weights = loaded.get("state_dict", loaded)
        for name, tensor in source.place.tensors.items():
            assert np.array_equal(weights[name].numpy(), tensor.bits())
            assert weights[name].name == again.place.tensors[name].unique


def test_the_second_predictor_of_passl_is_kept_beside_the_model(tmp_path: Path) -> None:
    source = foreign.source_of(PLSC, tmp_path)
    theirs = {
        name.replace("momentum_encoder.", "momentum_encoder.model.0."): tensor
        for name, tensor in source.place.tensors.items()
    }
    second = {
        name.replace("predictor.", "momentum_encoder.model.1."): tensor
        for name, tensor in theirs.items()
        if name.startswith("predictor.")
    }
    steps = {"momentum_encoder.steps": Stored.of(np.array(7))}
    tree = {**theirs, **second, **steps}
    found = recognise(Content(tmp_path / "w.pdparams", "paddle", tree))
    assert found.format.name == "passl" and found.renamed.unknown.keys() == {*second, *steps}
    assert {n: foreign.digest(t) for n, t in found.tensors.items()} == {
        n: foreign.digest(t) for n, t in source.tensors.items()
    }
    back, _ = found.layout.table.from_canonical(found.tensors, found.facts)
    spec = foreign.spec_of_source(PLSC, source)
    container, written = found.format.output(
        Output(found.layout, {**back, **found.renamed.unknown}, {}, spec)
    )
    assert container == "paddle" and written.keys() == tree.keys()
    assert len({tensor.unique for tensor in written.values()}) == len(tree)


def test_a_state_of_ours_shows_its_optimizer(tmp_path: Path) -> None:
    for file, name in ((FLEETX, "sgd"), (PLSC, "adamw")):
        source = foreign.source_of(file, tmp_path)
        tree = {**source.tensors, **source.fresh, **source.optimizer.tensors}
        own = recognise(Content(tmp_path / "w.npz", "npz", tree))
        spec = foreign.spec_of_source(file, own)
        assert own.format.name == "canonical" and spec.optim.name == name
        if name == "adamw":
            assert spec.model.freeze_patch_embed and spec.model.freeze_positions


@pytest.mark.parametrize("file", [f"{FLEETX}/model_state.pdopt", f"{VISION}.pdopt"])
def test_the_state_of_an_optimizer_alone_is_named(file: str) -> None:
    with pytest.raises(UserError, match=r"state of an optimizer \(conv2d_0.w_0_.* and no weights"):
        recognise(reading.read(foreign.FILES / file))


def test_paddle_goes_on_from_what_is_written(tmp_path: Path) -> None:
    """Paddle itself finds each velocity by the name of its parameter."""
    paddle = pytest.importorskip("paddle")
    source = foreign.source_of(FLEETX, tmp_path)
    spec = foreign.spec_of_source(FLEETX, source)
    state = formats.load_training_state(source.content.path, spec, print)
    state |= {n: a * 2 for n, a in state.items() if n.startswith("optimizer.momentum")}
    written(source.format, state, spec, tmp_path / "w")
    model = paddle.load(str(tmp_path / "w" / "model.pdparams"))
    trained = {
        ours: model[theirs]
        for ours, (theirs, *_) in source.renamed.origin.items()
        if f"optimizer.momentum_buffer.{ours}" in state
    }
    params = {}
    for ours, tensor in trained.items():
        made = paddle.create_parameter(tensor.shape, "float32")
        made.name = tensor.name  # another model of this process may have had the name
        made.set_value(tensor)
        made.stop_gradient = False
        params[ours] = made
    with paddle.utils.unique_name.guard():  # as in a process of its own
        optimizer = paddle.optimizer.Momentum(0.5, 0.75, parameters=list(params.values()))
        optimizer.set_state_dict(paddle.load(str(tmp_path / "w" / "model_state.pdopt")))
        paddle.add_n([param.sum() for param in params.values()]).backward()  # every gradient is 1
        optimizer.step()
    assert len(params) == 73
    for ours, param in params.items():
        theirs = source.renamed.origin[ours][0]
        velocity = state[f"optimizer.momentum_buffer.{ours}"]
        velocity = velocity.T if velocity.ndim == 2 else velocity
        expected = trained[ours].numpy() - 0.5 * (0.75 * velocity + 1.0)
        np.testing.assert_allclose(param.numpy(), expected, 1e-5, 1e-6, err_msg=theirs)
