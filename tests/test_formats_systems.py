"""The names of MoCo in other systems of PyTorch, and what is special about mmpretrain."""

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support import foreign
from support.resuming import written
from test_formats_hubs import content, refusal, same, vit_spec

from triptych.core.files import reading
from triptych.core.files.tree import Node, Stored
from triptych.core.formats import FORMATS
from triptych.core.formats.continuing import training_state
from triptych.core.formats.detection import recognise
from triptych.core.formats.format import Output
from triptych.core.formats.specs import spec_of

FILES = foreign.FILES
MOCO = "moco_v2_resnet18_torch1.9.pth.tar"
EMA = "mmpretrain_lincls_vit_epoch_1.pth"
LARS = "mmpretrain_mocov3_resnet18_lars_epoch_1.pth"

# -------------------------------------------------------------------------- names of other systems

SOLO: dict[str, str] = {
    "encoder_q.fc.": "projector.",
    "encoder_k.fc.": "momentum_projector.",
    "encoder_q.": "backbone.",
    "encoder_k.": "momentum_backbone.",
}
LIGHTLY = {
    "encoder_q.fc.": "projection_head.layers.",
    "encoder_k.fc.": "key_projection_head.layers.",
    "encoder_q.": "backbone.",
    "encoder_k.": "key_backbone.",
}
MMPRETRAIN = {
    "encoder_q.fc.": "neck.mlp.",
    "encoder_k.fc.": "encoder_k.module.1.mlp.",
    "encoder_q.": "backbone.",
    "encoder_k.": "encoder_k.module.0.",
}
QUERY = {
    "encoder_q.fc.0.": "heads|0.clf.0.",
    "encoder_q.fc.2.": "heads|1.clf.0.",
    "encoder_q.": "trunk|_feature_blocks.",
}
KEY = {
    "encoder_k.fc.0.": "loss|moco_encoder.heads.0.clf.0.",
    "encoder_k.fc.2.": "loss|moco_encoder.heads.1.clf.0.",
    "encoder_k.": "loss|moco_encoder.trunk._feature_blocks.",
    "queue": "loss|queue",
}


def respelled(tensors: dict[str, Stored], names: dict[str, str]) -> dict[str, Stored]:
    """The tensors under other names. The first beginning that fits is replaced."""
    found = {}
    for name, tensor in tensors.items():
        start = next((s for s in names if name.startswith(s)), "")
        found[names.get(start, "") + name.removeprefix(start)] = tensor
    return found


def solo(tensors: dict[str, Stored]) -> Node:
    """Two queues, one for each view, and a classifier."""
    found = respelled(tensors, SOLO)
    queue = found["queue"].array()
    found["queue"] = Stored.of(np.stack([queue, queue]))
    head = {"classifier.weight": Stored.of(np.ones((10, 16), np.float32))}
    return {"state_dict": {**found, **head}, "pytorch-lightning_version": "2.1.2"}


def lightly(tensors: dict[str, Stored]) -> Node:
    """No queue, and a classifier."""
    found = {n: t for n, t in respelled(tensors, LIGHTLY).items() if not n.startswith("queue")}
    head = {"online_classifier.classification_head.bias": Stored.of(np.ones(10, np.float32))}
    return {"state_dict": {**found, **head}, "pytorch-lightning_version": "2.6.6"}


def mmpretrain(tensors: dict[str, Stored]) -> Node:
    found = respelled(tensors, MMPRETRAIN)
    steps = {"encoder_k.steps": Stored.of(np.array(2, np.int64))}
    return {"meta": {"iter": 2}, "state_dict": {**found, **steps}}


def vissl(tensors: dict[str, Stored]) -> Node:
    found: dict[str, dict[str, Stored]] = {}
    for name, tensor in respelled(tensors, {**QUERY, **KEY}).items():
        part, _, rest = name.partition("|")
        found.setdefault(part, {})[rest] = tensor
    model = {"trunk": found["trunk"], "heads": found["heads"]}
    return {"loss": found["loss"], "classy_state_dict": {"base_model": {"model": model}}}


@pytest.mark.parametrize(
    ("name", "build", "beside"),
    [
        ("solo", solo, {"queue", "queue_ptr", "classifier.weight"}),
        ("lightly", lightly, {"online_classifier.classification_head.bias"}),
        ("mmpretrain", mmpretrain, {"encoder_k.steps"}),
        ("vissl", vissl, set()),
    ],
)
def test_the_names_of_moco_v2_in_other_systems(
    name: str, build: Callable[[dict[str, Stored]], Node], beside: set[str]
) -> None:
    official = recognise(reading.read(FILES / MOCO))
    source = recognise(content(build(official.place.tensors)))
    assert source.format.name == name and source.layout.methods[-1] == "moco_v2"
    assert source.renamed.unknown.keys() == beside
    lost = {"memory.queue", "memory.pointer"} if name in ("solo", "lightly") else set()
    assert same(source, {n: t for n, t in official.tensors.items() if n not in lost})


# -------------------------------------------------------------------------------------- mmpretrain


def test_an_ema_hook_stores_the_averaged_weights_as_the_state_dict() -> None:
    file = reading.read(FILES / EMA)
    assert "'state_dict', 'ema_state_dict'; say which: init.average" in refusal(file)
    averaged, trained = (recognise(file, average=value) for value in (True, False))
    about = foreign.description(EMA)
    name = "student.classifier.weight"
    for source, key, prefix in ((averaged, "tensors", ""), (trained, "tensors_ema", "module.")):
        expected = about[key][f"{prefix}head.layers.head.weight"]
        assert foreign.digest(source.tensors[name]) == expected
    assert list(trained.renamed.unknown) == ["steps"] and not averaged.renamed.unknown


def test_averaged_weights_that_are_asked_for_must_be_there() -> None:
    line = refusal(reading.read(FILES / MOCO), average=True)
    assert "no averaged weights, plain ones alone; leave init.average or --average out" in line


def test_a_published_file_says_its_hash_in_its_name(tmp_path: Path) -> None:
    digest = hashlib.sha256((FILES / EMA).read_bytes()).hexdigest()[:8]
    right = tmp_path / f"vit_in1k_20261128-{digest}.pth"
    wrong = tmp_path / "vit_in1k_20261128-0123abcd.pth"
    for path in (right, wrong):
        shutil.copyfile(FILES / EMA, path)
    assert recognise(reading.read(right), average=True).format.name == "mmpretrain"
    line = refusal(reading.read(wrong), average=True)
    assert line.startswith(f"{wrong}: mmpretrain: its name says that its SHA-256 begins with 0123")
    assert f"but it begins with {digest}" in line


@pytest.mark.parametrize(
    ("text", "heads"),
    [
        ("arch={'embed_dims': 24, 'num_heads': 3}", 3),
        ("backbone=dict(arch=dict(num_heads=6, num_layers=2))", 6),
        ("arch='base'", None),  # another width than that of the tensors
        ("num_heads=3, neck=dict(num_heads=4)", None),
        ("", None),
    ],
)
def test_heads_of_mmpretrain_count_where_the_configuration_states_them(
    text: str, heads: int | None
) -> None:
    file = reading.read(FILES / EMA)
    tree = {**file.tree, "meta": {"cfg": text}}
    found = recognise(replace(file, tree=tree), average=True)
    assert found.facts.get("model.heads") == heads


def test_heads_of_a_named_architecture_need_its_width_and_depth() -> None:
    blocks = {f"backbone.layers.{i}.ln1.weight": Stored.of(np.ones(384)) for i in range(12)}
    token = {"backbone.cls_token": Stored.of(np.ones((1, 1, 384)))}
    tree = {"state_dict": {**token, **blocks}, "meta": {"cfg": "arch='mocov3-small'"}}
    assert recognise(content(tree)).facts["model.heads"] == 12


def test_a_vit_of_mmpretrain_has_one_of_two_classifiers() -> None:
    file = recognise(reading.read(FILES / EMA), average=True)
    plain = {name.replace("layers.head", "fc"): t for name, t in file.place.tensors.items()}
    source = recognise(content({"state_dict": plain, "meta": {}}))
    assert same(source, file.tensors)
    names, _ = source.layout.table.from_canonical(source.tensors, {})
    assert names.keys() == plain.keys()


def test_mmengine_would_copy_the_weights_at_step_0() -> None:
    source = recognise(reading.read(FILES / LARS))
    names, _ = source.layout.table.from_canonical(source.tensors, {})
    for step, expected in ((None, 1), (0, 1), (7, 7)):
        made = Output(source.layout, names, {}, vit_spec(), step)
        tensors = FORMATS["mmpretrain"].output(made)[1]["state_dict"]
        assert tensors["momentum_encoder.steps"].array() == expected
        assert "encoder_k.steps" not in tensors
    kept = {**names, **source.renamed.unknown}
    tensors = FORMATS["mmpretrain"].output(Output(source.layout, kept, {}, vit_spec()))[1]
    assert tensors["state_dict"]["momentum_encoder.steps"].array() == 2


def test_frozen_parameters_may_have_no_number() -> None:
    """With options by parameter, mmengine numbers what is trained alone."""
    source = recognise(reading.read(FILES / LARS))
    optimizer = source.content.tree["optimizer"]
    assert len(optimizer["param_groups"]) == 68
    # The teacher's 64 parameters come last.
    groups = [{"momentum": 0.9, "params": [*range(68 + 64)]}]
    every = {**source.content.tree, "optimizer": {**optimizer, "param_groups": groups}}
    other = recognise(replace(source.content, tree=every)).optimizer
    assert source.optimizer and other and (source.optimizer.name, other.name) == ("lars", "sgd")
    assert source.optimizer.tensors.keys() == other.tensors.keys()


def test_the_momentum_of_lars_holds_the_learning_rate(tmp_path: Path) -> None:
    source = recognise(reading.read(FILES / LARS))
    spec = spec_of(source)
    assert spec.optim.form == "mmpretrain" and spec.method.teacher_statistics == "copied"
    plain = ["optim={name: lars, form: moco_v3, lr: 0.5, scale_lr_by: null}"]
    other = spec_of(source, plain)
    state = {name: tensor.array() for name, tensor in source.tensors.items()}
    own, moved = (training_state(source.optimizer, each, print) for each in (spec, other))
    name = "optimizer.momentum_buffer.student.encoder.conv1.weight"
    rate = source.content.tree["optimizer"]["param_groups"][0]["lr"]
    np.testing.assert_allclose(moved[name] * rate, own[name], rtol=1e-14)
    written(FORMATS["mmpretrain"], {**state, **moved}, other, tmp_path / "w.pth")
    again = recognise(reading.read(tmp_path / "w.pth"))
    np.testing.assert_allclose(again.optimizer.tensors[name].array(), moved[name] * 0.5)


def test_lars_has_a_group_for_each_trained_parameter(tmp_path: Path) -> None:
    source = recognise(reading.read(FILES / LARS))
    spec = spec_of(source)
    state = {name: tensor.array() for name, tensor in source.tensors.items()}
    state |= training_state(source.optimizer, spec, print)
    written(FORMATS["mmpretrain"], state, spec, tmp_path / "w.pth")
    before, after = (
        content.tree["optimizer"]["param_groups"]
        for content in (source.content, reading.read(tmp_path / "w.pth"))
    )
    keys = ("params", "weight_decay", "eta", "momentum", "lars_exclude")
    assert [[group.get(key) for key in keys] for group in before] == [
        [group.get(key) for key in keys] for group in after
    ]
