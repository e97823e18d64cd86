"""The encoder of any file as the beginning of a run."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from support.golden_replay import spec_file
from support.golden_weights import official_state

from triptych.core import checkpoint, config, formats
from triptych.core.config.spec import InitSpec, RunSpec
from triptych.core.contracts import State
from triptych.core.errors import UserError
from triptych.core.formats.detection import REMEDY
from triptych.core.parameters import initial_state, table

V1, V3, MOCA = "moco_v1_resnet18", "moco_v3_vit_tiny", "moca_vit_tiny"
BRANCHES = {
    V1: ("encoder_q.", "encoder_k."),
    V3: ("base_encoder.", "momentum_encoder."),
    MOCA: ("encoder.", "encoder_teacher."),
}
NARROW = {"width": 8}
FINETUNE = {"name": "finetune", "classes": 5, "pooling": "mean"}


def supervised(
    case: str,
    method: Mapping[str, object] | None = None,
    init: Mapping[str, object] | None = None,
    **model: object,
) -> RunSpec:
    """A spec with the encoder of a golden case and a classifier of five classes."""
    tree = config.load(spec_file(case)).model_dump()
    tree["method"] = method or {"name": "linear", "classes": 5}
    tree["model"] |= model
    del tree["optim"]
    return RunSpec.model_validate({**tree, "init": init or {}})


def encoder_of(case: str, branch: int = 0) -> State:
    """The encoder in the official state, under timm's or torchvision's names."""
    prefix = BRANCHES[case][branch]
    heads = (prefix + "head.", prefix + "fc.")
    return {
        name.removeprefix(prefix): array
        for name, array in official_state(case).items()
        if name.startswith(prefix) and not name.startswith(heads)
    }


def narrow_resnet() -> State:
    """A small ResNet-18 under torchvision's names."""
    prefix = "student.encoder."
    state = initial_state(supervised(V1, **NARROW))
    return {n.removeprefix(prefix): a for n, a in state.items() if n.startswith(prefix)}


def same(loaded: State, wanted: State) -> bool:
    """Whether the loaded tensors are the wanted ones, and all of them."""
    names = {f"student.encoder.{name}" for name in wanted}
    return loaded.keys() == names and all(
        np.array_equal(loaded[f"student.encoder.{name}"], array) for name, array in wanted.items()
    )


def saved(folder: Path, arrays: State) -> Path:
    path = folder / "weights.npz"
    np.savez(path, **arrays)
    return path


def load(path: Path, spec: RunSpec, **init: object) -> State:
    return formats.load_encoder(path, spec, InitSpec.model_validate(init))


def refusal(path: Path, spec: RunSpec, **init: object) -> list[str]:
    """The lines of the error, without the file's name."""
    with pytest.raises(UserError) as caught:
        load(path, spec, **init)
    lines = str(caught.value).split("\n")
    assert all(line.startswith(f"{path}: ") for line in lines)
    return [line.removeprefix(f"{path}: ") for line in lines]


# ------------------------------------------------------------------------------ what is loaded


@pytest.mark.parametrize("case", BRANCHES)
def test_each_branch_of_an_official_file_gives_its_encoder(tmp_path: Path, case: str) -> None:
    spec, official = supervised(case), official_state(case)
    save_file({f"module.{n}": a for n, a in official.items()}, tmp_path / "w")
    student, teacher = (
        load(tmp_path / "w", spec, branch=branch) for branch in ("student", "teacher")
    )
    assert same(student, encoder_of(case, 0)) and same(teacher, encoder_of(case, 1))
    assert not same(student, encoder_of(case, 1))
    order = [p.name for p in table(spec) if p.name.startswith("student.encoder.")]
    assert list(student) == order


@pytest.mark.parametrize("wrapper", ["", "module."])
def test_an_extracted_encoder_has_plain_names(tmp_path: Path, wrapper: str) -> None:
    for spec, encoder in (
        (supervised(V1, **NARROW), narrow_resnet()),
        (supervised(V3), encoder_of(V3, 1)),
        (supervised(MOCA), encoder_of(MOCA, 1)),
    ):
        path = saved(tmp_path, {wrapper + name: array for name, array in encoder.items()})
        assert same(load(path, spec, branch="teacher"), encoder)


def test_a_run_of_any_method_gives_its_encoder(tmp_path: Path) -> None:
    wanted = encoder_of(V3)
    for spec in (config.load(spec_file(V3)), supervised(V3), supervised(V3, {**FINETUNE})):
        state = initial_state(spec)
        state |= {f"student.encoder.{name}": array for name, array in wanted.items()}
        run = tmp_path / spec.method.name
        checkpoint.write(run, 2, {**state, "optimizer.step": np.array(2)}, spec, {}, keep=1)
        named = {}
        if spec.method.name == "finetune":
            assert refusal(run, supervised(V3)) == [
                "a classifier of 5 classes (student.classifier.weight), not a pretrained encoder; "
                "to take its encoder, set init.allow_unused to [student.classifier.]"
            ]
            named = {"allow_unused": ["student.classifier."]}
        assert same(load(run, supervised(V3), **named), wanted)
        if spec.method.name == "moco_v3":
            assert not same(load(run, supervised(V3), branch="teacher"), wanted)
        else:
            assert same(load(run, supervised(V3), branch="teacher", **named), wanted)


def test_a_norm_of_its_own_starts_fresh(tmp_path: Path) -> None:
    spec = supervised(MOCA, FINETUNE, fc_norm=True)
    wanted = {name: a for name, a in encoder_of(MOCA, 1).items() if not name.startswith("norm.")}
    path = saved(tmp_path, official_state(MOCA))
    assert same(load(path, spec, branch="teacher"), wanted)
    trained = {**wanted, "fc_norm.weight": np.full(96, 2.0), "fc_norm.bias": np.ones(96)}
    assert same(load(saved(tmp_path, trained), spec), trained)
    unknown = saved(tmp_path, {**wanted, "fc_norm.gain": np.ones(96)})
    assert refusal(unknown, spec) == ["unused fc_norm.gain (96,)"]


def test_teacher_and_student_begin_with_the_same_encoder(tmp_path: Path) -> None:
    path = saved(tmp_path, encoder_of(V3))
    averaged = {**FINETUNE, "momentum": 0.9}
    lines: list[str] = []
    for spec in (
        supervised(V3, averaged, {"weights": str(path)}),
        config.load(spec_file(V3), [f"init.weights={path}"]),
    ):
        state, fresh = formats.initial_state(spec, lines.append), initial_state(spec)
        assert list(state) == list(fresh)
        for name, array in state.items():
            _, part, rest = name.split(".", 2)
            wanted = encoder_of(V3)[rest] if part == "encoder" else fresh[name]
            assert np.array_equal(array, wanted), name
    text = f"init: {path} (timm, a ViT encoder): 42 tensors of the encoder; initial values: "
    assert lines == [
        text + "student.classifier, teacher.classifier",
        text + "student.projector, student.predictor, teacher.projector",
    ]


def test_the_home_folder_is_written_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    saved(tmp_path, encoder_of(V3))
    state = formats.initial_state(supervised(V3, init={"weights": "~/weights.npz"}))
    assert np.array_equal(state["student.encoder.cls_token"], encoder_of(V3)["cls_token"])


# ----------------------------------------------------------------------------- what is refused


def test_each_tensor_that_does_not_fit_is_one_line(tmp_path: Path) -> None:
    arrays = encoder_of(V3)
    del arrays["blocks.0.norm1.weight"]
    arrays["norm.weight"] = np.zeros(7)
    arrays["blocks.1.norm1.bias"] = np.full(192, np.nan)
    arrays["blocks.1.attn.proj.bias"] = np.zeros(192, np.int64)
    arrays["blocks.1.gamma"] = np.zeros(192)
    path = saved(tmp_path, {**arrays, "teacher_temp": np.zeros(1)})
    assert refusal(path, supervised(V3)) == [
        "missing student.encoder.blocks.0.norm1.weight (192,)",
        "unused blocks.1.gamma (192,)",
        "unused teacher_temp (1,)",
        "misshapen student.encoder.norm.weight: expected (192,), got (7,)",
        "unusable student.encoder.blocks.1.attn.proj.bias: expected floating-point numbers, "
        "got int64",
        "not finite: student.encoder.blocks.1.norm1.bias",
    ]


def test_what_is_named_may_be_missing_or_unused(tmp_path: Path) -> None:
    arrays = encoder_of(V3)
    del arrays["norm.weight"], arrays["norm.bias"]
    path = saved(tmp_path, {**arrays, "head.weight": np.zeros((9, 192)), "scale": np.zeros(1)})
    allowed = {"allow_missing": ["norm."], "allow_unused": ["head.", "scale"]}
    assert same(load(path, supervised(V3), **allowed), arrays)
    assert refusal(path, supervised(V3), **{**allowed, "allow_unused": ["head.", "sca"]}) == [
        "unused scale (1,)"
    ]
    assert refusal(path, supervised(V3), **{**allowed, "allow_missing": ["norm.bias"]}) == [
        "missing student.encoder.norm.weight (192,)"
    ]
    wrong = {**allowed, "allow_missing": ["norm.", "encoder.norm.", "nrom."]}
    assert refusal(path, supervised(V3), **wrong) == [
        "init.allow_missing: encoder.norm., nrom.: the model's encoder has no such tensor"
    ]


@pytest.mark.parametrize("head", ["head.", "fc."])
def test_a_classifier_is_no_pretrained_encoder(tmp_path: Path, head: str) -> None:
    resnet = head == "fc."
    spec = supervised(V1, **NARROW) if resnet else supervised(V3)
    arrays = narrow_resnet() if resnet else encoder_of(V3)
    shape = (1000, spec.model.features)
    more = {f"{head}weight": np.zeros(shape), f"{head}bias": np.zeros(1000)}
    path = saved(tmp_path, {**arrays, **more})
    assert refusal(path, spec) == [
        f"a classifier of 1000 classes ({head}weight), not a pretrained encoder; to take its "
        f"encoder, set init.allow_unused to [{head}]"
    ]
    assert same(load(path, spec, allow_unused=[head]), arrays)


@pytest.mark.parametrize(
    ("case", "other", "model", "line"),
    [
        (V3, V3, {"width": 96, "depth": 2}, "the file has width 192, depth 3, mlp width 768; the "
         "model width 96, depth 2, mlp width 384"),
        (MOCA, MOCA, {"image_size": 128, "patch_size": 16}, "the file has patch size 8; the model "
         "patch size 16"),
        (V1, V1, {"name": "resnet50", "block": "bottleneck", "depths": [3, 4, 6, 3], "width": 8},
         "the file has blocks 2-2-2-2, convolutions in a block 2; the model blocks 3-4-6-3, "
         "convolutions in a block 3"),
        (V1, V1, {"width": 16, "stem": "small"}, "the file has width 8, first kernel 7; the model "
         "width 16, first kernel 3"),
        (V1, V3, {}, "the file has a ResNet, blocks 2-2-2-2, convolutions in a block 2, width 8, "
         "channels 3, first kernel 7; the model is a ViT, stem patch, width 192, depth 3, mlp "
         "width 768, patch size 16, channels 3"),
    ],
)  # fmt: skip
def test_another_architecture_is_one_line(
    tmp_path: Path, case: str, other: str, model: dict[str, object], line: str
) -> None:
    path = saved(tmp_path, narrow_resnet() if case == V1 else official_state(case))
    lines = refusal(path, supervised(other, **model))
    assert lines == [f"weights of another architecture: {line}"]


def test_heads_that_no_shape_shows_come_from_the_manifest(tmp_path: Path) -> None:
    spec = supervised(V3)
    path = checkpoint.write(tmp_path, 2, initial_state(spec), spec, {}, keep=1)
    assert refusal(path, supervised(V3, heads=6, layer_norm_eps=1e-5)) == [
        "weights of another architecture: model.heads 3 -> 6, model.layer_norm_eps 1e-06 -> 1e-05"
    ]


def test_what_a_format_fixes_is_told_with_its_value(tmp_path: Path) -> None:
    path = saved(tmp_path, official_state(MOCA))
    assert refusal(path, supervised(MOCA, layer_norm_eps=1e-5)) == [
        "weights of another architecture: model.layer_norm_eps 1e-06 -> 1e-05; give the file's "
        "own: -o model.layer_norm_eps=1e-06"
    ]


@pytest.mark.parametrize(
    ("names", "line"),
    [
        (
            ("backbone.body.conv1.weight", "backbone.fpn.inner_blocks.0.weight"),
            "holds a detector (backbone.fpn.inner_blocks.0.weight), not an encoder or classifier",
        ),
        (
            ("encoder_q.fc.weight", "queue"),
            "holds no encoder: its names are those of MoCo v1 pretraining (moco), and none is of "
            "an encoder",
        ),
        (
            ("student.classifier.weight",),
            "holds no encoder: its names are those of a triptych state (canonical), and none is of "
            "an encoder",
        ),
        (
            ("outline.cls_token",),
            "holds outline.cls_token: names of no known format ("
            + ", ".join(formats.FORMATS)
            + f"); {REMEDY}",
        ),
    ],
)
def test_a_file_without_an_encoder_is_one_line(
    tmp_path: Path, names: tuple[str, ...], line: str
) -> None:
    path = saved(tmp_path, {name: np.zeros((2, 2)) for name in names})
    assert refusal(path, supervised(V3)) == [line]
