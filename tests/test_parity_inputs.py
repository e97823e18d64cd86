"""Images and draws of a trace from a file: what fits is used, anything else refused in one line."""

import numpy as np
import pytest
from support.native import draws, random_batch, tiny_spec

from triptych.core.config.spec import RunSpec
from triptych.core.errors import UserError
from triptych.core.parity.inputs import recorded
from triptych.core.parity.trace import fixed_hyper, run_trace

STEPS = 2


def arrays_of(spec):
    views = np.stack([random_batch(spec, step).views for step in range(STEPS)], axis=1)
    drawn = [draws(spec, step) for step in range(STEPS)]
    stacked = {name: np.stack([one[name] for one in drawn]) for name in drawn[0]}
    return {"view1": views[0], "view2": views[1], **stacked}


def read(tmp_path, spec, arrays, steps=STEPS):
    np.savez(tmp_path / "inputs.npz", **arrays)
    return recorded(tmp_path / "inputs.npz", spec, steps)


@pytest.mark.parametrize("case", ["moco_v3_vit", "moco_v2_bottleneck", "moca_vit"])
def test_what_was_recorded_comes_back(tmp_path, case):
    spec = tiny_spec(case=case)
    batches, drawn = read(tmp_path, spec, arrays_of(spec))
    for step, batch in enumerate(batches):
        for found, wanted in zip(batch.views, random_batch(spec, step).views, strict=True):
            np.testing.assert_array_equal(found, wanted)
        assert drawn(step).keys() == draws(spec, step).keys()
        for name, wanted in draws(spec, step).items():
            np.testing.assert_array_equal(drawn(step)[name], wanted)


def test_images_alone_keep_the_draws_of_the_spec(tmp_path):
    spec = tiny_spec(case="moca_vit")
    views = {name: a for name, a in arrays_of(spec).items() if name.startswith("view")}
    _, drawn = read(tmp_path, spec, views)
    for name, wanted in draws(spec, 1).items():
        np.testing.assert_array_equal(drawn(1)[name], wanted)


def test_unsigned_and_extended_numbers_are_made_plain(tmp_path):
    spec = tiny_spec(case="moco_v1_resnet18")
    arrays = arrays_of(spec)
    odd = {
        name: a.astype(np.longdouble if a.dtype.kind == "f" else np.uint8)
        for name, a in arrays.items()
    }
    batches, drawn = read(tmp_path, spec, odd)
    assert next(batches).views[0].dtype == np.float64
    assert drawn(1)["shuffle_perm"].dtype == np.int64
    np.testing.assert_array_equal(drawn(1)["shuffle_perm"], arrays["shuffle_perm"][1])


def renamed(arrays):
    return {{"mask_ids_round1": "mask_ids_round_1"}.get(k, k): a for k, a in arrays.items()}


def twice(order):
    order = order.copy()
    order[..., 0] = order[..., 1]
    return order


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (renamed, "mask_ids_round1: missing"),
        (lambda a: {k: v for k, v in a.items() if k != "codebook_coin"}, "codebook_coin: missing"),
        (lambda a: {**a, "shuffle_perm": a["codebook_image_perm"]}, "shuffle_perm: not among"),
        (lambda a: {**a, "view1": a["view1"][..., :-1]}, "view1: shape"),
        (lambda a: {**a, "view2": a["view2"][:, :-1]}, "view2: shape"),
        (lambda a: {**a, "view1": np.array(1.0)}, "view1: shape"),
        (lambda a: {**a, "mask_ids_round1": a["mask_ids_round1"] * 1.0}, "expected whole numbers"),
        (lambda a: {**a, "view1": a["view1"].astype(int)}, "expected real numbers"),
        (lambda a: {**a, "mask_ids_round1": twice(a["mask_ids_round1"])}, "mask_ids_round1: expec"),
        (lambda a: {**a, "mask_ids_round2": a["mask_ids_round1"]}, "round 1 has shown"),
        (lambda a: {**a, "codebook_image_perm": a["codebook_image_perm"] + 1}, "each of 0"),
        (lambda a: {**a, "codebook_token_pick": a["codebook_token_pick"] + 99}, "0 ... 2"),
        (lambda a: {**a, "codebook_coin": a["codebook_coin"] - 2}, "expected 0 to 1"),
        (lambda a: {k: v[:1] for k, v in a.items()}, "holds 1 steps, --steps is 2"),
    ],
)
def test_what_no_run_could_draw_is_refused(tmp_path, change, told):
    spec = tiny_spec(case="moca_vit")
    with pytest.raises(UserError, match=rf"inputs.npz: .*{told}"):
        read(tmp_path, spec, change(arrays_of(spec)))


def test_an_order_of_the_images_is_a_permutation(tmp_path):
    spec = tiny_spec(case="moco_v1_resnet18")
    arrays = arrays_of(spec)
    for wrong in (np.zeros_like(arrays["shuffle_perm"]), arrays["shuffle_perm"] + 1):
        with pytest.raises(UserError, match="step 0: shuffle_perm: expected each of 0"):
            read(tmp_path, spec, {**arrays, "shuffle_perm": wrong})


@pytest.mark.parametrize(
    "given",
    [
        '{"lr": -1, "weight_decay": 0, "ema": 0.9}',
        '{"lr": 1, "weight_decay": NaN, "ema": 0.9}',
        '{"lr": 1, "weight_decay": 0, "ema": 1.1}',
        '{"lr": Infinity, "weight_decay": 0, "ema": 1}',
        '{"lr": 1, "weight_decay": 0}',
    ],
)
def test_fixed_hyper_parameters_are_such(tmp_path, given):
    (tmp_path / "hyper.json").write_text(given)
    with pytest.raises(UserError, match=r"hyper.json: expected .*\"ema\""):
        fixed_hyper(tmp_path / "hyper.json")


def labelled(**method):
    """A probe of the tiny ViT with three classes."""
    given = tiny_spec().model_dump()
    return RunSpec.model_validate({**given, "method": {"name": "linear", "classes": 3, **method}})


@pytest.mark.parametrize(
    ("method", "shape"), [({}, (8, 3, 8, 12)), ({"features": "cached"}, (8, 32))]
)
def test_a_method_with_labels_reads_images_or_features_and_labels(tmp_path, method, shape):
    spec = labelled(**method)
    images, labels = np.ones((STEPS, *shape)), np.arange(STEPS * 8).reshape(STEPS, 8) % 3
    batches, drawn = read(tmp_path, spec, {"images": images, "labels": labels})
    for step, batch in enumerate(batches):
        assert [view.shape for view in batch.views] == [shape]
        np.testing.assert_array_equal(batch.labels, labels[step])
        assert drawn(step) == {}
    with pytest.raises(UserError, match=r"labels: 1 to 3, expected 0 to 2 \(method.classes 3\)"):
        read(tmp_path, spec, {"images": images, "labels": labels + 1})


def test_a_trace_of_cached_features_needs_them(tmp_path):
    with pytest.raises(UserError, match="features: cached: a trace needs the features"):
        list(run_trace(labelled(features="cached"), "numpy", 1))
