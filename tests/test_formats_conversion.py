"""Conversions: what is used, what is refused, what is written, and the check of themselves."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import foreign
from support.golden_weights import official_state
from test_formats_pretrained import encoder_of

from triptych.core import checkpoint, config, launch
from triptych.core.errors import UserError
from triptych.core.files import reading, saving
from triptych.core.files.tree import Stored
from triptych.core.formats import changes, destination
from triptych.core.formats.adapting import adapted_channels
from triptych.core.formats.conversion import Plan, Request, plan
from triptych.core.formats.detection import FORMATS
from triptych.core.formats.forward import Values, features
from triptych.core.formats.selfcheck import check
from triptych.core.launch import REFERENCE
from triptych.core.optim import scaling

PLSC = foreign.FILES / "plsc_moco_v3_vit.pd"
MOCA = foreign.FILES / "moca_full_vit_torch2.pth"
HEADS = ("model.heads=3",)
MORE = (*HEADS, "method.decoder_heads=2")
"""Of MOCA, whose decoder has heads, too."""
FEATURES = 1e-10


def planned(path: Path, target: str, **wishes: Any) -> Plan:
    return plan(path, Request(target, overrides=wishes.pop("overrides", HEADS), **wishes))


def converted(path: Path, to: Path, target: str, **wishes: Any) -> Plan:
    """Converts without the check of the command, so that a fault can be looked at."""
    made = planned(path, target, **wishes)
    assert not made.problems
    destination.write(to, made, lambda done: None)
    return made


def digests(path: Path, target: str) -> dict[str, list[Any]]:
    """The tensors in all state dicts of a file."""
    spots = FORMATS[target].places(reading.read(path))
    return {name: foreign.digest(tensor) for spot in spots for name, tensor in spot.tensors.items()}


@pytest.mark.parametrize(("source", "name"), [(PLSC, "plsc"), (MOCA, "moca")])
def test_every_tensor_comes_back_from_all_containers(source: Path, name: str, tmp_path: Path):
    heads = MORE if name == "moca" else HEADS
    first = converted(source, tmp_path / "canonical", "canonical", overrides=heads)
    last = tmp_path / "canonical"
    for hop in ("oneflow", "paddle", "torch", "canonical"):
        made = converted(last, tmp_path / f"{hop}-2", hop, overrides=())
        assert made.optimizer.keys() == first.optimizer.keys()
        last = tmp_path / f"{hop}-2"
    converted(last, tmp_path / "back", name, overrides=())
    assert digests(tmp_path / "back", name) == digests(source, name)


@pytest.mark.parametrize("branch", [None, "student"])
def test_a_classifier_without_counters_comes_back(tmp_path: Path, branch: str | None):
    source = foreign.FILES / "paddle_resnet18_adamw.pdparams"
    made = converted(source, tmp_path / "c", "canonical", overrides=())
    assert sum(row.kind == "new, at its initial value" for row in made.rows) == 20
    assert [one.branch for one in check(made, REFERENCE)] == ["student"]
    converted(tmp_path / "c", tmp_path / "w", "paddle", overrides=(), branch=branch)
    assert digests(tmp_path / "w", "paddle") == digests(source, "paddle")


def test_a_single_network_has_the_names_that_can_hold_all_of_it(tmp_path: Path):
    """paddle.vision counts no batches, so counters go there under canonical names."""
    source = last = foreign.FILES / "torchvision_resnet18_half_legacy.pth"
    names = {"oneflow": "bn1.running_mean", "paddle": "student.encoder.bn1.num_batches_tracked",
             "torch": "student.encoder.bn1.running_mean", "torchvision": "bn1.weight"}  # fmt: skip
    for hop, name in names.items():
        made = converted(last, tmp_path / hop, hop, overrides=())
        assert name in made.written
        last = tmp_path / hop
    assert digests(last, "torchvision") == digests(source, "torchvision")


@pytest.mark.parametrize("file", ["plsc_moco_v3_vit.pd", "libai_moco_v3_vit"])
def test_the_arithmetic_of_a_format_gives_the_features_of_its_system(file: str, tmp_path: Path):
    source = foreign.source_of(file, tmp_path)
    spec = foreign.spec_of_source(file, source)
    images = foreign.images(foreign.description(file)["image_size"])
    for branch in ("student", "teacher"):
        how = source.format.arithmetic[0]
        tokens = features(how, Values(source.place.tensors), branch, images, spec.model)
        golden = foreign.golden(file)[f"{branch}/tokens"]
        assert np.abs(tokens - golden).max() < FEATURES * np.abs(golden).max()


def test_every_format_states_its_arithmetic():
    assert all(found.arithmetic for found in FORMATS.values())


def broken(monkeypatch: pytest.MonkeyPatch, fault: str) -> tuple[Path, str]:
    """A conversion with a fault that keeps all names and shapes: its source and target."""
    transposed = changes.Transposed.to_canonical

    def square_as_it_is(self: Any, parts: Any, facts: Any) -> Stored:
        rows, columns = parts[0].shape
        return parts[0] if rows == columns else transposed(self, parts, facts)

    if fault == "a transpose is skipped":
        monkeypatch.setattr(changes.Transposed, "to_canonical", square_as_it_is)
    elif fault == "rows are not permuted":
        monkeypatch.setattr(changes.Interleaved, "from_canonical", lambda self, t, facts: [t])
    return PLSC, "libai" if fault == "rows are not permuted" else "moco_v3"


@pytest.mark.parametrize("fault", ["a transpose is skipped", "rows are not permuted"])
def test_the_check_sees_a_fault_of_a_change(monkeypatch: pytest.MonkeyPatch, fault: str):
    source, target = broken(monkeypatch, fault)
    with pytest.raises(UserError, match=r"student's encoder differ .* nothing was written"):
        check(planned(source, target), REFERENCE)


def test_the_check_sees_exchanged_branches_and_positions():
    made = planned(PLSC, "moco_v3")
    names = {"student": "base_encoder.cls_token", "teacher": "momentum_encoder.cls_token"}
    first, second = (made.written[name] for name in names.values())
    made.written.update(zip(names.values(), (second, first), strict=True))
    with pytest.raises(UserError, match="the arithmetic of moco_v3"):
        check(made, REFERENCE)
    made = planned(PLSC, "moco_v3")
    table = made.written["base_encoder.pos_embed"].array()
    grid = table[:, 1:].reshape(1, 4, 4, -1).swapaxes(1, 2).reshape(1, 16, -1)
    made.written["base_encoder.pos_embed"] = Stored.of(np.concatenate([table[:, :1], grid], 1))
    with pytest.raises(UserError, match="the student's encoder"):
        check(made, REFERENCE)


@pytest.mark.parametrize("target", ["timm", "moco_v3", "canonical", "libai"])
def test_the_encoder_is_that_of_the_branch(target: str, tmp_path: Path):
    names = {"timm": "cls_token", "moco_v3": "cls_token", "libai": "cls_token",
             "canonical": "student.encoder.cls_token"}  # fmt: skip
    raw = planned(PLSC, "canonical").source.place.tensors
    for branch, prefix in (("student", "base_encoder"), ("teacher", "momentum_encoder")):
        made = planned(PLSC, target, branch=branch)
        assert not made.problems and not made.optimizer
        token = made.written[names[target]]
        assert np.array_equal(token.array(), raw[f"{prefix}.cls_token"].array())
        assert [one.branch for one in check(made, REFERENCE)] == [branch]
        assert "predictor.0.weight" in made.left


REFUSED = [
    ("timm", {}, "--to timm: .* of MoCo v3 pretraining .* one encoder: say --branch student or"),
    ("moco", {}, "--to moco: it can hold MoCo v1 pretraining, .* of a ViT"),
    ("lightly", {}, "--to lightly: .* is only read"),
    ("canonical", {"parts": ["classifier"]}, "--parts classifier: the file holds MoCo v3"),
    ("timm", {"branch": "student", "parts": ["heads"]}, "--to timm: it holds no heads"),
    ("canonical", {"overrides": ()}, "the file does not say model.heads; give -c SPEC or -o"),
    ("canonical", {"recipe": "moco_v3/vit_small", "overrides": ()}, "width 24.*width 384"),
    ("canonical", {"recipe": "moca/digits", "overrides": ()}, "holds MoCo v3 .* give a recipe of"),
    ("timm", {"branch": "student", "image_size": (48, 32)}, "grid of 4x4 .* 6x4 .*--positions"),
    ("canonical", {"wanted": "moca"}, "names of no known format .moca.|not moca"),
]  # fmt: skip


@pytest.mark.parametrize(("target", "wishes", "message"), REFUSED)
def test_what_cannot_be_is_refused(target: str, wishes: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        planned(PLSC, target, **wishes)


def test_a_recipe_of_pretraining_describes_the_encoder_of_a_classifier(tmp_path: Path):
    arrays = dict(encoder_of("moco_v3_vit_tiny"))
    arrays |= {"head.weight": np.ones((5, 192)), "head.bias": np.ones(5)}
    source = npz(tmp_path / "w.npz", arrays)
    keys = ["model.width=192", "model.depth=3", "model.heads=3", "model.channels=3"]
    more = ["model.image_size=64", "model.patch_size=16", "data.channels=3"]
    pixels = [
        "augment.mean=[0.5]",
        "augment.std=[0.5]",
        "data.name=image_folder",
        "data.root=x",
        "evaluate.every=0",
    ]
    recipe = tmp_path / "spec.yaml"
    recipe.write_text(config.dump(config.load("moco_v3/digits", [*keys, *more, *pixels])))
    made = planned(source, "canonical", recipe=str(recipe), overrides=())
    assert not made.problems and made.spec.method.name == "finetune"
    assert made.spec.model.heads == 3 and "student.classifier.weight" in made.written


def test_a_norm_that_the_target_lacks_is_named(tmp_path: Path):
    arrays = dict(encoder_of("moco_v3_vit_tiny"))
    arrays |= {f"fc_norm.{n}": arrays.pop(f"norm.{n}") for n in ("weight", "bias")}
    arrays |= {"head.weight": np.ones((5, 192)), "head.bias": np.ones(5)}
    with pytest.raises(UserError, match=r"no place for student.encoder.fc_norm.weight, student"):
        planned(npz(tmp_path / "w.npz", arrays), "huggingface")


def test_zero_channels_are_refused():
    with pytest.raises(UserError, match=r"model.channels=0: .*expected an integer >= 1"):
        planned(PLSC, "timm", branch="student", channels=0)


def npz(path: Path, arrays: dict[str, np.ndarray]) -> Path:
    np.savez(path, **arrays)
    return path


def test_each_missing_and_each_unused_tensor_is_named(tmp_path: Path):
    arrays = dict(official_state("moco_v3_vit_tiny"))
    kept = {n: a for n, a in arrays.items() if n != "base_encoder.blocks.1.norm1.bias"}
    source = npz(tmp_path / "w.npz", {**kept, "strange.weight": np.ones(3, np.float32)})
    bias = "student.encoder.blocks.1.norm1.bias"
    made = planned(source, "moco_v3")
    assert len(made.problems) == 1 and not made.unused  # its own format keeps what it has beside
    made = planned(source, "plsc")
    assert [line.partition(";")[0] for line in made.problems] == [
        "unused strange.weight (3,)",
        f"missing {bias} (192,)",
    ]
    named = {"allow_missing": [bias], "allow_unused": ["strange."]}
    assert not planned(source, "plsc", **named).problems
    assert check(planned(source, "plsc", **named), REFERENCE) == []


def test_what_has_no_twin_is_kept_for_its_own_format(tmp_path: Path):
    strange = np.arange(3, dtype=np.float32)
    arrays = {**official_state("moco_v3_vit_tiny"), "strange.weight": strange}
    source = npz(tmp_path / "w.npz", arrays)
    converted(source, tmp_path / "c", "canonical")
    made = planned(tmp_path / "c", "moco_v3", overrides=())
    assert np.array_equal(made.written["strange.weight"].array(), strange)
    assert "strange.weight" not in planned(tmp_path / "c", "plsc", overrides=()).written


def test_a_whole_state_becomes_a_checkpoint_to_go_on_from(tmp_path: Path):
    made = converted(MOCA, tmp_path / "moca", "canonical", overrides=MORE)
    manifest, state = checkpoint.read(tmp_path / "moca")
    assert manifest.step == int(state["optimizer.step"]) == made.step
    checkpoint.check_spec(manifest, made.spec)
    launch.open_engine(made.spec, REFERENCE, state, whole=True)
    assert manifest.extra["converted"]["format"] == "moca"


def test_entries_of_an_optimizer_that_fit_no_tensor_are_named(tmp_path: Path):
    converted(PLSC, tmp_path / "w.pth", "torch")
    tree = reading.read(tmp_path / "w.pth").tree
    bias = "optimizer.exp_avg.student.encoder.norm.bias"
    lies = {"optimizer.step": np.ones((2, 2)), bias: np.ones(7), f"{bias}x": np.ones(24)}
    saving.write(
        tmp_path / "x.pth", {**tree, **{n: Stored.of(a) for n, a in lies.items()}}, "torch"
    )
    assert planned(tmp_path / "x.pth", "canonical", overrides=()).problems == [
        f"misshapen {bias}: expected (24,), got (7,)",
        "misshapen optimizer.step: expected (), got (2, 2)",
        f"unusable {bias}x: the model has no such tensor",
    ]
    lies = {"optimizer.step": np.array(-1), bias: np.ones(24, np.int64)}
    saving.write(
        tmp_path / "x.pth", {**tree, **{n: Stored.of(a) for n, a in lies.items()}}, "torch"
    )
    assert planned(tmp_path / "x.pth", "canonical", overrides=()).problems == [
        f"unusable {bias}: expected floating-point numbers, got int64",
        "unusable optimizer.step: expected a whole number >= 0, got -1",
    ]


def test_the_scale_of_a_loss_stays_in_our_own_formats(tmp_path: Path):
    """And in those of MoCo v3 and MOCA. Without it, a run in float16 begins with a new scale."""
    converted(PLSC, tmp_path / "w.pth", "torch")
    tree = reading.read(tmp_path / "w.pth").tree
    scale = {name: Stored.of(np.array(n)) for n, name in enumerate(scaling.ENTRIES, 1)}
    saving.write(tmp_path / "x.pth", {**tree, **scale}, "torch")
    made = converted(tmp_path / "x.pth", tmp_path / "own", "canonical", overrides=())
    assert scale.keys() < made.optimizer.keys()
    _, state = checkpoint.read(tmp_path / "own")
    assert [int(state[name]) for name in scaling.ENTRIES] == [1, 2, 3]
    made = planned(tmp_path / "own", "plsc", overrides=())
    assert made.optimizer and not scale.keys() & made.optimizer.keys()
    told = "files of PLSC (PaddlePaddle/PLSC) hold none; it begins anew"
    assert {made.left[name] for name in scale} == {told}
    saving.write(
        tmp_path / "x.pth", {**tree, scaling.ENTRIES[0]: Stored.of(np.array(0.5))}, "torch"
    )
    assert planned(tmp_path / "x.pth", "canonical", overrides=()).problems == [
        "unusable optimizer.scale: expected a whole number >= 0, got 0.5"
    ]


@pytest.mark.parametrize("target", ["plsc", "passl", "libai"])
def test_a_convolutional_stem_goes_to_each_system(target: str, tmp_path: Path):
    path = npz(tmp_path / "w.npz", dict(official_state("moco_v3_vit_conv_tiny")))
    made = converted(path, tmp_path / "w", target)
    assert {one.branch for one in check(made, REFERENCE)} == {"student", "teacher"}


def shrunk(path: Path, name: str, array: np.ndarray | None) -> Path:
    """A file of MoCo v3 in which one tensor is another one, or is missing."""
    arrays = dict(official_state("moco_v3_vit_tiny"))
    del arrays[name]
    return npz(path, arrays if array is None else {**arrays, name: array})


FIRST_TENSORS = [
    ("cls_token", None, "cls_token or conv1.weight.*the file has none; give -c"),
    ("cls_token", np.ones(192), r"base_encoder.cls_token \(192,\): expected 3 dimensions"),
    ("pos_embed", np.ones((1, 0, 192)), r"base_encoder.pos_embed .*none of them empty"),
    ("blocks.0.mlp.fc1.bias", np.ones(()), r"blocks.0.mlp.fc1.bias \(\): expected 1 dimensions"),
    ("patch_embed.proj.weight", np.ones((1, 3)), r"proj.weight \(1, 3\): expected 4 dimensions"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "array", "message"), FIRST_TENSORS)
def test_shapes_that_no_model_has_are_named(
    name: str, array: np.ndarray | None, message: str, tmp_path: Path
):
    path = shrunk(tmp_path / "w.npz", f"base_encoder.{name}", array)
    with pytest.raises(UserError, match=rf"w.npz: .*{message}"):
        planned(path, "canonical")


def test_an_encoder_with_numbers_that_are_none_is_named(tmp_path: Path):
    bias = np.full(192, np.nan, np.float32)
    path = shrunk(tmp_path / "w.npz", "base_encoder.norm.bias", bias)
    with pytest.raises(UserError, match=r"base_encoder.norm.bias: 192 of 192 numbers are not fin"):
        check(planned(path, "timm", branch="student"), REFERENCE)


def test_one_branch_is_taken_beside_an_optimizer_that_does_not_fit(tmp_path: Path):
    content = reading.read(PLSC).tree
    assert isinstance(content, dict) and isinstance(content["state_dict"], dict)
    del content["state_dict"]["predictor.0.weight"]
    path = tmp_path / "w.pd"
    saving.write(path, content, "paddle")
    with pytest.raises(UserError, match="--parts encoder,heads"):
        planned(path, "canonical")
    for wishes in ({"branch": "student"}, {"parts": ["encoder"]}):
        assert not planned(path, "canonical", **wishes).problems


def test_one_branch_on_other_images_and_channels(tmp_path: Path):
    wishes = {"branch": "teacher", "image_size": (48, 32), "positions": "bicubic", "channels": 1}
    made = converted(PLSC, tmp_path / "w.pth", "timm", **wishes)
    assert made.written["pos_embed"].shape == (1, 25, 24)
    assert made.written["patch_embed.proj.weight"].shape == (24, 1, 8, 8)
    assert {row.kind for row in made.rows} >= {"3 to 1 channels", "resized (bicubic)"}
    assert [one.branch for one in check(made, REFERENCE)] == ["teacher"]


def test_first_layers_are_adapted_as_in_timm():
    weight = np.float32(np.random.default_rng(0).standard_normal((4, 3, 2, 2)))
    assert np.allclose(adapted_channels(weight, 1)[:, 0], weight.sum(axis=1), atol=1e-6)
    four = adapted_channels(weight, 4)
    assert four.dtype == np.float32
    assert np.array_equal(four, weight[:, [0, 1, 2, 0]] * np.float32(0.75))
    grey = adapted_channels(weight, 6).sum(axis=1)
    assert np.allclose(grey, weight.sum(axis=1), atol=1e-6)  # six equal channels give the same
