"""Mixup, CutMix and smoothed targets: golden draws replayed, and our own draws."""

import json
from pathlib import Path

import numpy as np
import pytest

from triptych.core.config.mixing import MixSpec, mixing_contradictions
from triptych.core.contracts import Batch
from triptych.core.methods import mixing

GOLDEN = Path(__file__).parent / "golden/eval/finetune_batch"
ARRAYS = np.load(GOLDEN.with_suffix(".npz"))
CASES = json.loads(GOLDEN.with_suffix(".json").read_text())
IMAGES = ARRAYS["mixup/images"].astype(np.float64)
LABELS = ARRAYS["mixup/labels"]
SIZE = IMAGES.shape[2:]
ORIGINALS = ["mixup", "mixup_1.0.31"]
RUNS = [
    (original, run)
    for original, key in zip(ORIGINALS, ["runs", "runs_1.0.31"], strict=True)
    for run in CASES["mixup"][key]
]


def batch_of(images: np.ndarray) -> Batch:
    """The first images of the batch, with their labels."""
    return Batch((images,), np.arange(len(images)), LABELS[: len(images)])


def replayed(original: str, run: str) -> tuple[dict[str, np.ndarray], dict]:
    """The golden draws in our form, and the settings of the original."""
    case = CASES["mixup"]["runs" if original == "mixup" else "runs_1.0.31"][run]
    share = np.atleast_1d(np.array(case["params"]["lam"], np.float64))
    cut = np.atleast_1d(case["params"]["use_cutmix"]) & (share != 1)
    box = np.full((len(share), 4), -1)
    for place, call in zip(np.flatnonzero(cut), case["calls"], strict=True):
        box[place], share[place] = call["box_yl_yh_xl_xh"], call["lam_corrected"]
    if len(share) == 1:
        share, box = np.repeat(share, 6), np.repeat(box, 6, axis=0)
    elif len(share) == 3:
        share, box = np.concatenate([share, share[::-1]]), np.concatenate([box, box[::-1]])
    draws = {"mix_partner": np.arange(6)[::-1], "mix_share": share, "mix_box": box}
    return draws, case["args"]


@pytest.mark.parametrize(("original", "run"), RUNS)
def test_mixing_gives_the_golden_images_and_targets(original, run):
    draws, args = replayed(original, run)
    images, targets = mixing.mix(batch_of(IMAGES), draws, 5, args["label_smoothing"])
    # Shares of single images are float32 in the original.
    tolerance = 0 if args["mode"] == "batch" else 2e-7
    wanted = [ARRAYS[f"{original}/{run}/{name}"] for name in ("images", "targets")]
    np.testing.assert_allclose(images, wanted[0], rtol=0, atol=tolerance)
    np.testing.assert_allclose(targets, wanted[1], rtol=0, atol=max(tolerance, 1e-15))


@pytest.mark.parametrize("kind", ["mixup_0", "mixup_1", "cutmix_0", "cutmix_1"])
def test_mmpretrain_mixes_by_a_permutation(kind):
    case = CASES["mm_batch"][kind]
    share = case.get("lam_corrected", case["lam_drawn"])
    box = case.get("box_yl_yh_xl_xh", [-1] * 4)
    draws = {
        "mix_partner": ARRAYS[f"mm_batch/{kind}/index"],
        "mix_share": np.full(6, share),
        "mix_box": np.tile(box, (6, 1)),
    }
    images, targets = mixing.mix(batch_of(IMAGES), draws, 5, 0.0)
    np.testing.assert_array_equal(images, ARRAYS[f"mm_batch/{kind}/images"])
    np.testing.assert_allclose(targets, ARRAYS[f"mm_batch/{kind}/targets"], rtol=0, atol=6e-8)


@pytest.mark.parametrize(("rule", "first"), [("even", 5), ("exact", 10)])
def test_boxes_and_their_shares_equal_the_golden_table(rule, first):
    for row in ARRAYS["cutmix_box_table"]:
        size = int(row[0]), int(row[1])
        box = mixing.boxes(size, row[2:3], row[3:5].astype(np.int64)[None], rule)
        assert [int(side[0]) for side in box] == list(row[first : first + 4])
        assert box.share(size)[0] == row[first + 4]


@pytest.mark.parametrize("name", [name for name in CASES["loss"] if "soft_target" != name])
def test_smoothed_targets_give_the_golden_losses(name):
    logits = ARRAYS["loss/logits"]
    logs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    smoothing = 0.3 if "0.3" in name else 0.1
    targets = mixing.one_hot(ARRAYS["loss/labels"], 5, smoothing)
    if name == "mm_original_0.1_soft":  # mmpretrain smooths labels that are mixed already
        targets = 0.9 * ARRAYS["loss/soft_targets"] + 0.1 / 5
    loss = -(targets * logs).sum(axis=1).mean()
    assert loss == pytest.approx(CASES["loss"][name], rel=1e-6 if "mm" in name else 1e-14)


def test_smoothing_mixed_labels_equals_mixing_smoothed_labels():
    """mmpretrain does the first, timm the second."""
    draws, _ = replayed("mixup", "batch_0")
    _, before = mixing.mix(batch_of(IMAGES), draws, 5, 0.1)
    _, plain = mixing.mix(batch_of(IMAGES), draws, 5, 0.0)
    np.testing.assert_allclose(before, 0.9 * plain + 0.1 / 5, rtol=0, atol=1e-15)


def drawn(**keys) -> dict[str, np.ndarray]:
    return mixing.draws(MixSpec(**keys), 7, 3, 600, (20, 30))


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
def test_draws_are_shared_as_the_mode_says(mode):
    counts = {"batch": 1, "pair": 300, "elem": 600}
    assert len(np.unique(drawn(mixup=0.8, mode=mode)["mix_share"])) == counts[mode]
    draws = drawn(mixup=0.8, cutmix=1.0, mode=mode)
    share, box = draws["mix_share"], draws["mix_box"]
    if mode != "elem":
        np.testing.assert_array_equal(share, share[draws["mix_partner"]])
        np.testing.assert_array_equal(box, box[draws["mix_partner"]])
    mixing.check_draws(draws, (20, 30))


def test_draws_have_their_probabilities_and_shares():
    draws = drawn(mixup=0.8, cutmix=1.0, prob=0.6, switch_prob=0.25, mode="elem")
    share, cut = draws["mix_share"], draws["mix_box"][:, 0] >= 0
    untouched = (share == 1) & ~cut
    assert untouched.mean() == pytest.approx(0.4, abs=0.08)
    assert cut.mean() == pytest.approx(0.15, abs=0.06)
    blended = share[~untouched & ~cut]
    assert blended.mean() == pytest.approx(0.5, abs=0.06)
    assert blended.var() == pytest.approx(1 / (4 * 2.6), abs=0.02)  # of Beta(0.8, 0.8)
    top, bottom, left, right = draws["mix_box"][cut].T
    np.testing.assert_array_equal(share[cut], 1 - (bottom - top) * (right - left) / 600)


@pytest.mark.parametrize(("keys", "cut"), [({"mixup": 0.8}, False), ({"cutmix": 1.0}, True)])
def test_one_kind_alone_is_always_that_kind(keys, cut):
    box = drawn(**keys, mode="elem")["mix_box"]
    assert ((box[:, 0] >= 0) == cut).all()


@pytest.mark.parametrize(("rule", "reach"), [("even", (19, 29)), ("exact", (20, 30))])
def test_cutmix_sides_bound_the_box(rule, reach):
    box = drawn(cutmix_sides=(0.2, 0.8), mode="elem", box=rule)["mix_box"]
    top, bottom, left, right = box.T
    assert (set(bottom - top), set(right - left)) == (set(range(4, 16)), set(range(6, 24)))
    assert (bottom.max(), right.max(), top.min(), left.min()) == (*reach, 0, 0)


def test_partners_may_be_permuted():
    draws = drawn(mixup=0.8, partner="permuted")
    assert sorted(draws["mix_partner"]) == list(range(600))
    assert list(draws["mix_partner"]) != list(range(600))[::-1]


def test_draws_depend_on_seed_and_step_alone():
    spec = MixSpec(mixup=0.8, cutmix=1.0, mode="elem")
    first, again, later, other = (
        mixing.draws(spec, seed, step, 8, (9, 9))["mix_share"]
        for seed, step in ((1, 5), (1, 5), (1, 6), (2, 5))
    )
    assert (first == again).all()
    assert (first != later).any()
    assert (first != other).any()


def test_without_mixing_there_are_smoothed_targets_alone():
    spec = MixSpec(smoothing=0.1)
    draws = mixing.draws(spec, 0, 0, 6, SIZE)
    images = IMAGES.astype(np.float32)
    result, targets = mixing.mix(batch_of(images), draws, 5, spec.smoothing)
    assert draws == {}
    assert result is images
    assert targets.dtype == np.float64
    np.testing.assert_array_equal(targets.argmax(axis=1), LABELS)


def test_mixing_keeps_the_type_and_its_argument():
    images = IMAGES.astype(np.float32)
    before = images.copy()
    draws, _ = replayed("mixup", "elem_1")
    result, targets = mixing.mix(batch_of(images), draws, 5, 0.1)
    assert (result.dtype, targets.dtype) == (np.float32, np.float64)
    np.testing.assert_array_equal(images, before)
    np.testing.assert_allclose(targets.sum(axis=1), 1, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "value"), [("mix_partner", 0), ("mix_share", 1.5), ("mix_box", 40)]
)
def test_impossible_draws_are_refused(name, value):
    draws = drawn(mixup=0.8, cutmix=1.0)
    draws[name] = np.full_like(draws[name], value)
    with pytest.raises(ValueError, match=name):
        mixing.check_draws(draws, (20, 30))


def test_odd_batches_have_no_reversed_partners():
    (problem,) = mixing_contradictions(MixSpec(mixup=0.8), 7)
    assert problem.key == "train.batch_size"
    assert "7 is odd" in str(problem)
    for spec, batch in ((MixSpec(mixup=0.8, partner="permuted"), 7), (MixSpec(), 7)):
        assert not list(mixing_contradictions(spec, batch))
    assert not list(mixing_contradictions(MixSpec(mixup=0.8), 8))


def test_pairs_need_reversed_partners():
    with pytest.raises(ValueError, match="make no pairs"):
        MixSpec(mixup=0.8, mode="pair", partner="permuted")


@pytest.mark.parametrize("count", [1, 3, 5, 6])
def test_a_smaller_last_batch_takes_its_part_of_the_draws(count):
    spec = MixSpec(mixup=0.8, cutmix=1.0, mode="elem", partner="permuted")
    draws = mixing.draws(spec, seed=3, step=1, batch=6, size=SIZE)
    part = mixing.first(draws, count)
    assert sorted(part["mix_partner"]) == list(range(count))
    images, targets = mixing.mix(batch_of(IMAGES[:count]), draws, 5, 0.1)
    np.testing.assert_array_equal(images, mixing.mixed(IMAGES[:count], part))
    np.testing.assert_allclose(targets.sum(1), np.ones(count), rtol=1e-15)
    if count == 6:
        np.testing.assert_array_equal(part["mix_partner"], draws["mix_partner"])
