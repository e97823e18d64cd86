"""The official names of MoCo v1, v2 and of MoCo v3's residual networks, both ways."""

import numpy as np
import pytest
from support.golden_replay import format_of, spec_file
from support.golden_weights import GOLDEN, description, official_state, probe
from support.marks import marked

from triptych.core import config, formats
from triptych.core.errors import UserError
from triptych.core.parameters import initial_state, table

CASES = ["moco_v1_resnet18", "moco_v2_resnet50", "moco_v3_resnet50", "moco_v3_vit_conv_tiny"]
SMALL = "moco_v1_resnet18"
MOCA = "moca_vit_tiny"
CODEBOOK = "bow_extractor.bow_extractor.0."
PLACES = {
    "moco_v1_resnet18": {
        "student.projector.0.weight": "encoder_q.fc.weight",
        "teacher.projector.0.bias": "encoder_k.fc.bias",
        "teacher.encoder.layer2.0.downsample.1.running_var": (
            "encoder_k.layer2.0.downsample.1.running_var"
        ),
        "memory.queue": "queue",
        "memory.pointer": "queue_ptr",
    },
    "moco_v2_resnet50": {
        "student.projector.0.weight": "encoder_q.fc.0.weight",
        "student.projector.2.bias": "encoder_q.fc.2.bias",
        "teacher.projector.2.weight": "encoder_k.fc.2.weight",
    },
    "moco_v3_resnet50": {
        "student.projector.3.weight": "base_encoder.fc.3.weight",
        "teacher.projector.4.running_mean": "momentum_encoder.fc.4.running_mean",
        "student.predictor.0.weight": "predictor.0.weight",
        "student.encoder.conv1.weight": "base_encoder.conv1.weight",
    },
    "moco_v3_vit_conv_tiny": {
        "student.projector.6.weight": "base_encoder.head.6.weight",
        "teacher.encoder.patch_embed.proj.12.bias": "momentum_encoder.patch_embed.proj.12.bias",
    },
}


def load(case):
    spec = config.load(spec_file(case))
    return spec, format_of(spec)


@pytest.mark.parametrize("case", CASES)
def test_the_table_names_every_official_tensor(case):
    spec, known = load(case)
    names = known.names(spec)
    shapes = {p.name: (1,) if p.name == "memory.pointer" else p.shape for p in table(spec)}
    ours = {names[p.name]: (shapes[p.name], p.trainable, p.buffer) for p in table(spec)}
    theirs = {
        entry["name"]: (tuple(entry["shape"]), entry["trainable"], not entry["parameter"])
        for entry in description(case)["state"]
    }
    assert ours == theirs
    assert PLACES[case].items() <= names.items()


LARGE = [case for case in CASES if "resnet50" in case]


@pytest.mark.parametrize("case", marked(CASES, LARGE[1:], pytest.mark.soak))
def test_there_and_back_is_bit_identical(case):
    spec, known = load(case)
    official = official_state(case)
    state = known.to_canonical(official, spec)
    assert set(state) == {p.name for p in table(spec)}
    back = known.from_canonical({**state, "optimizer.step": np.array(3)}, spec)
    assert back.keys() == official.keys()
    for name, array in official.items():
        assert (back[name].dtype, back[name].shape) == (array.dtype, array.shape)
        assert back[name].tobytes() == array.tobytes()
    assert int(state.get("memory.pointer", 0)) == 0


@pytest.mark.parametrize("case", marked(CASES, LARGE[:1], pytest.mark.soak))
def test_golden_weights_are_those_of_the_reference(case):
    with np.load(GOLDEN / f"{case}.npz") as golden:
        for i, (name, array) in enumerate(official_state(case).items()):
            norm = np.linalg.norm(array.astype(np.float64).ravel())
            assert norm == pytest.approx(golden["state_norm"][0, i], rel=1e-12), name
            assert probe(array) == pytest.approx(golden["state_probe"][0, i], abs=1e-10), name


def test_a_file_of_official_names_loads(tmp_path):
    spec, _ = load(SMALL)
    official = {f"module.{name}": array for name, array in official_state(SMALL).items()}
    np.savez(tmp_path / "moco.npz", **official)
    state = formats.load_weights(tmp_path / "moco.npz", spec)
    assert list(state) == [p.name for p in table(spec)]
    assert state["memory.pointer"].shape == ()


@pytest.mark.parametrize(
    ("case", "other", "line"),
    [
        ("moco_v1_resnet18", "moco_v3_resnet50", "MoCo v1 pretraining (moco); it needs moco_v1"),
        (
            "moco_v3_vit_conv_tiny",
            "moco_v1_resnet18",
            "MoCo v3 pretraining (moco_v3); it needs",
        ),
    ],
)
def test_names_of_another_method_are_refused(tmp_path, case, other, line):
    np.savez(tmp_path / "weights.npz", **official_state(case))
    with pytest.raises(UserError) as caught:
        formats.load_weights(tmp_path / "weights.npz", config.load(spec_file(other)))
    assert str(caught.value).startswith(f"{tmp_path}/weights.npz: method.name:")
    assert line in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda s: {**s, "queue_ptr": np.zeros(2, np.int64)}, "misshapen memory.pointer"),
        (
            lambda s: {**s, "queue": s["queue"][:, :-1]},
            "misshapen memory.queue: expected (128, 64)",
        ),
        (lambda s: {n: a for n, a in s.items() if n != "queue"}, "missing memory.queue (128, 64)"),
        (
            lambda s: {**s, "encoder_q.fc.2.weight": np.zeros((1, 1))},
            "unused encoder_q.fc.2.weight",
        ),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, change, line):
    spec, _ = load(SMALL)
    np.savez(tmp_path / "moco.npz", **change(official_state(SMALL)))
    with pytest.raises(UserError, match=line.replace("(", r"\(").replace(")", r"\)")):
        formats.load_weights(tmp_path / "moco.npz", spec)


@pytest.mark.parametrize(
    ("case", "name", "value", "line"),
    [
        (SMALL, "queue_ptr", [64], "memory.pointer: expected a whole number >= 0 below 64, got 64"),
        (SMALL, "queue_ptr", [-5], "memory.pointer: expected a whole number"),
        (
            SMALL,
            "queue_ptr",
            [2.7],
            "memory.pointer: expected a whole number >= 0 below 64, got 2.7",
        ),
        (SMALL, "queue_ptr", [True], "memory.pointer: expected a whole number"),
        (SMALL, "queue", 0.0, "memory.queue: 64 of 64 vectors are not of length 1"),
        (SMALL, "queue", 1e30, "memory.queue: 64 of 64 vectors are not of length 1"),
        (MOCA, CODEBOOK + "_embedding_ptr", [9999], "memory.pointer: expected a whole number"),
        (MOCA, CODEBOOK + "_track_num_batches", [-3.5], "memory.updates: expected a whole number"),
        (MOCA, CODEBOOK + "_dist_norm_prev", [0.0], "memory.distance_used: expected a number > 0"),
        (MOCA, CODEBOOK + "_dist_norm", [-1.0], "memory.distance: expected a number > 0"),
        (MOCA, CODEBOOK + "_embedding", 0.0, "memory.words: "),
    ],
)
def test_a_memory_that_cannot_be_right_is_named(tmp_path, case, name, value, line):
    spec, _ = load(case)
    official = dict(official_state(case))
    assert name in official
    official[name] = (
        np.array(value) if isinstance(value, list) else np.full_like(official[name], value)
    )
    np.savez(tmp_path / "weights.npz", **official)
    with pytest.raises(UserError) as caught:
        formats.load_weights(tmp_path / "weights.npz", spec)
    assert f"weights.npz: unusable {line}" in str(caught.value)


def test_canonical_files_with_a_queue_load(tmp_path):
    spec, _ = load(SMALL)
    state = initial_state(spec)
    np.savez(tmp_path / "own.npz", **state)
    loaded = formats.load_weights(tmp_path / "own.npz", spec)
    assert all(np.array_equal(loaded[name], state[name]) for name in state)
    (name, *_) = [n for n in state if n.endswith("running_var")]
    np.savez(tmp_path / "bad.npz", **{**state, name: state[name].astype(np.int64)})
    with pytest.raises(UserError, match="unusable"):
        formats.load_weights(tmp_path / "bad.npz", spec)
