"""Weights from elsewhere: the official MoCo v3 names, both ways, and what does not fit."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from support import golden_weights

from triptych.core import checkpoint, formats
from triptych.core.config.spec import LinearSpec, RunSpec
from triptych.core.contracts import State
from triptych.core.errors import UserError
from triptych.core.formats import FORMATS
from triptych.core.formats.detection import REMEDY
from triptych.core.parameters import initial_state, table

CASES = ("moco_v3_vit_tiny", "moco_v3_vit_s16_224")
TINY = CASES[0]


def golden_spec(case: str, **model: object) -> RunSpec:
    """The case's configuration as a spec."""
    config = golden_weights.description(case)["config"]
    return RunSpec.model_validate(
        {
            "model": {
                "name": "vit",
                "width": config["embed_dim"],
                "depth": config["depth"],
                "heads": config["heads"],
                "patch_size": config["patch"],
                "image_size": config["img"],
                **model,
            },
            "method": {
                "name": "moco_v3",
                "hidden_dim": config["mlp_dim"],
                "output_dim": config["dim"],
            },
            "train": {"steps": config["steps"], "batch_size": config["N"]},
        }
    )


@pytest.fixture
def official() -> State:
    """A copy, which a test may spoil."""
    return {name: array.copy() for name, array in golden_weights.official_state(TINY).items()}


@pytest.fixture
def spec() -> RunSpec:
    return golden_spec(TINY)


def same(a: State, b: State) -> bool:
    """Names, dtypes, shapes and bits, in any order."""
    return a.keys() == b.keys() and all(
        (a[n].dtype, a[n].shape, a[n].tobytes()) == (b[n].dtype, b[n].shape, b[n].tobytes())
        for n in a
    )


V3 = FORMATS["moco_v3"]
SUFFIXES = {
    "encoder": ("base_encoder", "momentum_encoder"),
    "projector": ("base_encoder.head", "momentum_encoder.head"),
    "predictor": ("predictor", None),
}


def misplaced(state: State, official: State) -> list[str]:
    """Canonical names that do not hold what the official state dict has in their place."""
    found = []
    for name, array in state.items():
        branch, part, rest = name.split(".", 2)
        wanted = official[f"{SUFFIXES[part][branch == 'teacher']}.{rest}"]
        if array.dtype != wanted.dtype or not np.array_equal(array, wanted):
            found.append(name)
    return found


# -------------------------------------------------------------------------- the golden weights


def test_golden_weights_are_those_of_the_reference(official: State) -> None:
    """Probe, norm and images as recorded from the original code."""
    with np.load(golden_weights.GOLDEN / f"{TINY}.npz") as golden:
        norms = [np.linalg.norm(a.astype(np.float64).ravel()) for a in official.values()]
        probes = [golden_weights.probe(a) for a in official.values()]
        np.testing.assert_allclose(norms, golden["state_norm"][0], rtol=1e-12, atol=0)
        np.testing.assert_allclose(probes, golden["state_probe"][0], rtol=0, atol=1e-11)
        for step in range(3):
            sums = [view.sum() for view in golden_weights.views(TINY, step)]
            np.testing.assert_allclose(sums, golden[f"image_sum/step{step}"], rtol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_the_table_names_every_official_tensor(case: str) -> None:
    """Names, shapes and who is trained, against those recorded from the original code."""
    spec = golden_spec(case)
    names = V3.names(spec)
    ours = {names[p.name]: (p.shape, p.trainable, p.buffer) for p in table(spec)}
    theirs = {
        entry["name"]: (tuple(entry["shape"]), entry["trainable"], not entry["parameter"])
        for entry in golden_weights.description(case)["state"]
    }
    assert ours == theirs


# ------------------------------------------------------------------------------- both directions


def test_every_tensor_goes_to_its_place(official: State, spec: RunSpec) -> None:
    state = FORMATS["moco_v3"].to_canonical(official, spec)
    assert len(state) == len(official) == len(table(spec))
    assert misplaced(state, official) == []


def swap_branches(state: State) -> State:
    swap = {"student": "teacher", "teacher": "student"}
    moved = {}
    for name in state:
        branch, rest = name.split(".", 1)
        other = f"{swap[branch]}.{rest}"
        moved[name] = state[other if other in state else name]
    return moved


def transpose_square(state: State) -> State:
    name = "student.encoder.blocks.1.attn.proj.weight"
    assert state[name].shape[0] == state[name].shape[1]
    return {**state, name: state[name].T}


def swap_layers(state: State) -> State:
    a, b = (f"student.encoder.blocks.{i}.mlp.fc1.weight" for i in (0, 1))
    return {**state, a: state[b], b: state[a]}


@pytest.mark.parametrize("mutate", [swap_branches, transpose_square, swap_layers])
def test_a_tensor_in_the_wrong_place_is_seen(
    official: State, spec: RunSpec, mutate: Callable[[State], State]
) -> None:
    mutated = mutate(V3.to_canonical(official, spec))
    assert misplaced(mutated, official)
    assert not same(V3.from_canonical(mutated, spec), official)


def test_there_and_back_is_bit_identical(official: State, spec: RunSpec) -> None:
    state = V3.to_canonical(official, spec)
    assert same(V3.from_canonical(state, spec), official)
    assert same(V3.to_canonical(V3.from_canonical(state, spec), spec), state)
    assert not same(state, official)


def test_the_optimizer_stays_behind(official: State, spec: RunSpec) -> None:
    state = {**V3.to_canonical(official, spec), "optimizer.step": np.array(3)}
    assert same(V3.from_canonical(state, spec), official)


# -------------------------------------------------------------------------------- loading files


def test_weights_come_from_any_container_and_names(
    tmp_path: Path, official: State, spec: RunSpec
) -> None:
    state = V3.to_canonical(official, spec)
    optimizer = {"optimizer.step": np.array(3)}
    np.savez(tmp_path / "official.npz", **official)
    np.savez(tmp_path / "canonical.npz", **state)
    save_file({f"module.{n}": a for n, a in official.items()}, tmp_path / "wrapped.safetensors")
    save_file({**state, **optimizer}, tmp_path / "with_optimizer.safetensors")
    run = tmp_path / "run"
    path = checkpoint.write(run, 3, {**state, **optimizer}, spec, {}, keep=1)

    for name in ("official.npz", "canonical.npz", "wrapped.safetensors"):
        loaded = formats.load_weights(tmp_path / name, spec)
        assert same(loaded, state) and list(loaded) == [p.name for p in table(spec)]
    for source in (tmp_path / "with_optimizer.safetensors", path, run):
        assert same(formats.load_weights(source, spec), {**state, **optimizer})


def test_the_position_table_is_that_of_the_file(
    tmp_path: Path, official: State, spec: RunSpec
) -> None:
    for branch in ("base_encoder", "momentum_encoder"):
        official[f"{branch}.pos_embed"] = official[f"{branch}.pos_embed"] + 1
    np.savez(tmp_path / "w.npz", **official)
    loaded = formats.load_weights(tmp_path / "w.npz", spec)
    assert np.array_equal(loaded["student.encoder.pos_embed"], official["base_encoder.pos_embed"])


def check_refused(path: Path, spec: RunSpec, *lines: str) -> None:
    """The error has exactly these lines after the file's name."""
    with pytest.raises(UserError) as caught:
        formats.load_weights(path, spec)
    assert str(caught.value).splitlines() == [f"{path}: {line}" for line in lines]


def test_what_does_not_fit_is_listed_with_shapes(
    tmp_path: Path, official: State, spec: RunSpec
) -> None:
    del official["base_encoder.cls_token"], official["predictor.0.weight"]
    official["base_encoder.surplus"] = np.zeros((2, 3))
    official["momentum_encoder.norm.bias"] = np.zeros(7)
    official["base_encoder.norm.bias"] = np.zeros(192, np.int64)
    official["base_encoder.norm.weight"][3] = np.nan
    np.savez(tmp_path / "w.npz", **official)
    check_refused(
        tmp_path / "w.npz",
        spec,
        "missing student.encoder.cls_token (1, 1, 192)",
        "missing student.predictor.0.weight (256, 64)",
        "unused base_encoder.surplus (2, 3)",
        "misshapen teacher.encoder.norm.bias: expected (192,), got (7,)",
        "unusable student.encoder.norm.bias: expected floating-point numbers, got int64",
        "not finite: student.encoder.norm.weight",
    )


def test_a_long_list_is_cut(tmp_path: Path, official: State, spec: RunSpec) -> None:
    np.savez(tmp_path / "w.npz", **{"predictor.0.weight": official["predictor.0.weight"]})
    with pytest.raises(UserError) as caught:
        formats.load_weights(tmp_path / "w.npz", spec)
    lines = str(caught.value).splitlines()
    assert len(lines) == 9 and lines[-1].endswith(f"missing: {len(table(spec)) - 9} more")


def test_a_name_with_and_without_wrapper_is_not_merged(
    tmp_path: Path, official: State, spec: RunSpec
) -> None:
    official["module.base_encoder.norm.bias"] = official["base_encoder.norm.bias"] + 1
    np.savez(tmp_path / "w.npz", **official)
    check_refused(tmp_path / "w.npz", spec, "unused module.base_encoder.norm.bias (192,)")


def test_nothing_loaded_is_an_error(tmp_path: Path, spec: RunSpec) -> None:
    np.savez(tmp_path / "none.npz")
    known = f"names of no known format ({', '.join(FORMATS)})"
    with pytest.raises(UserError, match=r"none.npz: an empty archive: it holds nothing"):
        formats.load_weights(tmp_path / "none.npz", spec)
    np.savez(tmp_path / "other.npz", fc=np.zeros(1), conv=np.zeros(1))
    check_refused(tmp_path / "other.npz", spec, f"holds fc, conv: {known}; {REMEDY}")
    (tmp_path / "run").mkdir()
    check_refused(
        tmp_path / "run",
        spec,
        "holds no whole checkpoint; give a run, a checkpoint, or what a system has saved",
    )


def test_a_checkpoint_of_another_architecture_is_one_line(
    tmp_path: Path, official: State, spec: RunSpec
) -> None:
    state = V3.to_canonical(official, spec)
    path = checkpoint.write(tmp_path, 3, state, spec, {}, keep=1)
    check_refused(
        path,
        golden_spec(TINY, width=96, depth=2),
        "a checkpoint of another architecture: model.width 192 -> 96, model.depth 3 -> 2; give -c "
        "the spec.yaml of its run",
    )


def test_equal_shapes_with_another_meaning_are_refused(
    tmp_path: Path, official: State, spec: RunSpec
) -> None:
    path = checkpoint.write(tmp_path, 3, V3.to_canonical(official, spec), spec, {}, keep=1)
    heads = spec.model.heads
    model = spec.model.model_copy(update={"heads": 2 * heads})
    check_refused(
        path,
        spec.model_copy(update={"model": model}),
        f"a checkpoint of another architecture: model.heads {heads} -> {2 * heads}; give -c "
        "the spec.yaml of its run",
    )
    model = spec.model.model_copy(update={"freeze_patch_embed": not spec.model.freeze_patch_embed})
    method = spec.method.model_copy(update={"temperature": 0.9})
    formats.load_weights(path, spec.model_copy(update={"model": model, "method": method}))


def test_a_classifier_has_the_rates_of_its_training(tmp_path: Path, spec: RunSpec) -> None:
    probe = LinearSpec(name="linear", classes=3, rates=(0.1, 1.0))
    trained = spec.model_copy(update={"method": probe})
    path = checkpoint.write(tmp_path, 1, initial_state(trained), trained, {}, keep=1)
    for changed, line in (
        (probe.model_copy(update={"rates": (1.0, 0.1)}), "method.rates [0.1, 1.0] -> [1.0, 0.1]"),
        (probe.model_copy(update={"pooling": "mean"}), "method.pooling cls -> mean"),
    ):
        check_refused(
            path,
            spec.model_copy(update={"method": changed}),
            f"a checkpoint of another architecture: {line}; give -c the spec.yaml of its run",
        )
    check_refused(
        path,
        spec,
        "a checkpoint of method linear, and the recipe has method moco_v3; give -c the spec.yaml "
        "of its run",
    )
