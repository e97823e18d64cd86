"""Schedules: the golden tables, and what a schedule owes at its ends."""

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from triptych.core import config
from triptych.core.errors import UserError
from triptych.core.optim import schedules
from triptych.core.optim.plan import Plan

GOLDEN = np.load(Path(__file__).parent / "golden" / "schedules.npz")
IMAGES = 1_281_167
"""Training images of ImageNet-1k; the last, smaller batch of an epoch is dropped."""

B4096, B1024 = "moco_v3_vit_b4096_300ep", "moco_v3_vit_small_b1024_300ep"
PUBLISHED = [
    ("moco_v3/vit_small", (), B4096),
    ("moco_v3/vit_base", (), B4096),
    ("moco_v3/vit_large", (), B4096),
    ("moco_v3/vit_small", ("train.batch_size=1024",), B1024),
    ("moco_v3/vit_conv_small", (), B4096),
    ("moco_v3/vit_conv_base", (), B4096),
    ("moco_v3/resnet50_100ep", (), "moco_v3_r50_100ep"),
    ("moco_v3/resnet50_300ep", (), "moco_v3_r50_300ep"),
    ("moco_v3/resnet50_1000ep", (), "moco_v3_r50_1000ep"),
    ("moco_v1/resnet50", (), "moco_v1_pretrain"),
    ("moco_v1/resnet50_paddle", (), "moco_v1_pretrain"),
    ("moco_v2/resnet50", (), "moco_v2_pretrain"),
    ("moco_v2/resnet50_paddle", (), "moco_v2_pretrain"),
    ("moca/v1_0_vit_base", (), "moca_v1_0_200ep"),
    ("moca/v0_9_vit_base", (), "moca_v0_9_200ep"),
]


def difference(recipe: str, overrides: tuple[str, ...], golden: str) -> dict[str, float]:
    """Largest difference of each column from the golden one, relative to its largest value."""
    spec = config.load(recipe, overrides)
    plan = Plan(spec, IMAGES // spec.train.batch_size)
    rows = [plan.hyper(int(step)) for step in GOLDEN[f"{golden}/iter"]]
    positions = [plan.position(int(step)) for step in GOLDEN[f"{golden}/iter"]]
    own = {
        "epoch": np.floor(positions) if spec.optim.per == "epoch" else positions,
        "lr": [row.lr for row in rows],
        "wd": [row.weight_decay for row in rows],
        "m": [row.ema for row in rows],
    }
    want = {name: GOLDEN[f"{golden}/{name}"] for name in own}
    return {n: float(np.abs(own[n] - want[n]).max() / np.abs(want[n]).max()) for n in own}


@pytest.mark.parametrize(("recipe", "overrides", "golden"), PUBLISHED)
def test_recipes_have_the_published_schedules(recipe, overrides, golden):
    gaps = difference(recipe, overrides, golden)
    assert set(gaps) == {"epoch", "lr", "wd", "m"}
    assert max(gaps.values()) <= 1e-15, gaps


@pytest.mark.parametrize(
    "change",
    ["milestones=[119, 160]", "milestones=[120]", "factor=0.2", "lr=0.031"],
)
def test_the_comparison_sees_other_milestones(change):
    gaps = difference("moco_v1/resnet50", (f"optim.{change}",), "moco_v1_pretrain")
    assert gaps["lr"] > 1e-3


def test_milestones_of_the_fact_sheet():
    plan = Plan(config.load("moco_v1/resnet50"), 5004)
    rates = [plan.hyper(epoch * 5004).lr for epoch in (0, 119, 120, 159, 160, 199)]
    assert rates == pytest.approx([0.03, 0.03, 0.003, 0.003, 0.0003, 0.0003], rel=1e-12)
    assert plan.hyper(120 * 5004 - 1).lr == 0.03
    plan = Plan(config.load("moco_v2/resnet50"), 5004)
    rates = [plan.hyper(epoch * 5004 + 77).lr for epoch in (0, 1, 50, 100, 150, 199)]
    want = [0.03, 0.0299981, 0.0256066, 0.015, 0.00439340, 1.8505e-6]
    assert rates == pytest.approx(want, rel=1e-4)


def test_milestones_in_steps_and_a_warm_up():
    steps = plan("optim.schedule=multistep", "optim.milestones=[100, 200]", "optim.factor=0.5")
    rates = [steps.hyper(step).lr for step in (0, 15, 30, 99, 100, 199, 200, 299)]
    assert rates == pytest.approx([0, 5e-4, 1e-3, 1e-3, 5e-4, 5e-4, 2.5e-4, 2.5e-4], rel=1e-12)


@pytest.mark.parametrize(
    ("change", "column"),
    [
        ("optim.warmup_epochs=39", "lr"),
        ("optim.per=epoch", "lr"),
        ("optim.end_lr=1e-6", "lr"),
        ("optim.scale_lr_by=255", "lr"),
        ("optim.weight_decay=0.09", "wd"),
        ("optim.weight_decay_end=0.2", "wd"),
        ("method.momentum=0.991", "m"),
        ("method.momentum_schedule=constant", "m"),
        ("train.epochs=299", "m"),
    ],
)
def test_the_comparison_sees_a_change(change, column):
    assert difference("moco_v3/vit_small", (change,), B4096)[column] > 1e-6


def test_total_steps_are_whole_batches():
    spec = config.load("moco_v3/vit_base")
    assert Plan(spec, IMAGES // 4096).total_steps == GOLDEN[f"{B4096}/iter"][-1] + 1


def plan(*overrides: str, steps_per_epoch: int = 10) -> Plan:
    """A run of 300 steps with a warm-up of 30 to a rate of 1e-3, changed."""
    settled = (
        "train.steps=300",
        "optim.warmup_steps=30",
        "optim.lr=1e-3",
        "optim.weight_decay=0.05",
    )
    return Plan(config.load("moco_v3/digits", [*settled, *overrides]), steps_per_epoch)


def test_steps_and_epochs_are_the_same_schedule():
    by_epoch = plan(
        "train.steps=null", "train.epochs=30", "optim.warmup_steps=null", "optim.warmup_epochs=3"
    )
    by_step = plan()
    assert by_epoch.total_steps == by_step.total_steps == 300
    for step in range(300):
        ours, theirs = by_step.hyper(step), by_epoch.hyper(step)
        assert ours.step == theirs.step == step
        assert math.isclose(ours.lr, theirs.lr, rel_tol=1e-12, abs_tol=1e-18)
        assert math.isclose(ours.ema, theirs.ema, rel_tol=1e-12)


def test_units_of_warmup_convert():
    mixed, plain = plan("optim.warmup_steps=null", "optim.warmup_epochs=3"), plan()
    assert [mixed.hyper(s) for s in range(300)] == [plain.hyper(s) for s in range(300)]
    mixed = plan("train.steps=null", "train.epochs=30")
    assert mixed.warmup == 3.0


def test_per_epoch_holds_the_rate_within_an_epoch():
    held = plan("optim.per=epoch", "optim.warmup_steps=0")
    rates = [held.hyper(step).lr for step in range(300)]
    assert all(len(set(rates[e * 10 : e * 10 + 10])) == 1 for e in range(30))
    assert rates[::10] == [
        plan("optim.warmup_steps=0").hyper(step).lr for step in range(0, 300, 10)
    ]
    # The teacher's momentum moves with every step all the same.
    assert held.hyper(5).ema > held.hyper(4).ema


def test_constant_schedule_still_warms_up():
    constant = plan("optim.schedule=constant")
    assert constant.hyper(0).lr == 0.0
    assert constant.hyper(15).lr == pytest.approx(0.5e-3, rel=1e-12)
    assert {constant.hyper(step).lr for step in range(30, 300)} == {1e-3}


def test_stop_at_changes_no_schedule():
    short, whole = plan("train.stop_at=20"), plan()
    assert short.last_step == 20
    assert short.total_steps == 300
    assert [short.hyper(s) for s in range(20)] == [whole.hyper(s) for s in range(20)]


def test_weight_decay_moves_to_its_end():
    moving = plan("optim.weight_decay_end=0.5")
    assert moving.hyper(0).weight_decay == pytest.approx(0.05, rel=1e-12)
    assert moving.hyper(150).weight_decay == pytest.approx(0.275, rel=1e-12)
    assert moving.hyper(299).weight_decay == pytest.approx(0.5, rel=1e-3)


def test_warmup_longer_than_the_run_is_an_error():
    with pytest.raises(UserError, match="warm-up of 310 steps is longer than the run of 300"):
        plan("optim.warmup_steps=null", "optim.warmup_epochs=31")


positive = st.floats(1e-6, 1e3)


@given(positive, st.floats(0, 1e-6), st.floats(0, 50), st.floats(51, 500), st.floats(0, 1))
def test_warmup_cosine_stays_in_bounds(peak, end, warmup, total, fraction):
    position = fraction * total
    value = schedules.warmup_cosine(peak, end, warmup, total, position)
    assert 0 <= value <= peak * (1 + 1e-12)
    if position >= warmup:
        assert value >= end * (1 - 1e-12)


@given(positive, st.floats(0, 1e-6), st.floats(1, 50), st.floats(51, 500))
def test_warmup_cosine_meets_its_marks(peak, end, warmup, total):
    assert schedules.warmup_cosine(peak, end, warmup, total, 0) == 0
    assert schedules.warmup_cosine(peak, end, warmup, total, warmup) == pytest.approx(peak)
    assert schedules.warmup_cosine(peak, end, warmup, total, total) == pytest.approx(end, abs=1e-18)


@given(st.floats(0, 1), st.integers(2, 1000))
def test_ema_momentum_rises_from_base_to_one(base, total):
    values = [schedules.ema_momentum(base, total, step) for step in range(total + 1)]
    assert values == sorted(values)
    assert values[0] == pytest.approx(base, abs=1e-15)
    assert values[-1] == 1.0


def test_multistep_falls_at_its_milestones():
    values = [schedules.multistep(1.0, (2, 4), 0.1, position) for position in range(6)]
    assert values == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01], rel=1e-15)


def test_scaled_lr():
    assert schedules.scaled_lr(1.5e-4, 4096, 256) == 1.5e-4 * 16
    assert schedules.scaled_lr(1e-3, 4096, None) == 1e-3


EVAL = np.load(Path(__file__).parent / "golden" / "eval" / "eval_schedules.npz")
PROBES = {
    "moca_finetune_readme": "moca/v1_0_vit_base_finetune",
    "moca_finetune_no_warmup": "moca/v0_9_vit_base_finetune",
    "moco_v1v2_linear": "moco_v1/resnet50_linear",
    "moco_v3_linear_vit": "moco_v3/vit_base_linear",
    "moco_v3_linear_resnet50": "moco_v3/resnet50_1000ep_linear",
    "deit_finetune_150ep_b1024": "moco_v3/vit_base_finetune",
    "deit_transfer_100ep_b1024": "moco_v3/transfer/cifar10",
    "mm_moco_v3_vit_base_finetune": "vit-base-p16_mocov3-pre_8xb64-coslr-150e_in1k",
    "mm_moco_v3_vit_large_finetune": "vit-large-p16_mocov3-pre_8xb64-coslr-100e_in1k",
    "mm_moco_v3_vit_base_linear": "vit-base-p16_mocov3-pre_8xb128-linear-coslr-90e_in1k",
    "mm_moco_v3_vit_small_linear": "vit-small-p16_mocov3-pre_8xb128-linear-coslr-90e_in1k",
    "mm_moco_v3_resnet50_linear": "resnet50_mocov3-100e-pre_8xb128-linear-coslr-90e_in1k",
    "mm_moco_v2_resnet50_linear": "resnet50_mocov2-pre_8xb32-linear-steplr-100e_in1k",
}
"""The recipe of each golden schedule of evaluation."""
CHANGED = {
    "moca_finetune_no_warmup": (
        *("optim.lr=5e-4", "optim.scale_lr_by=null", "optim.warmup_epochs=0"),
        *("optim.end_lr=1e-5", "train.epochs=20"),
    )
}
STEPS_PER_EPOCH = {"moca_finetune_no_warmup": 50, "deit_transfer_100ep_b1024": 50_000 // 1024}
RECURSIVE = ("mm_moco_v3_vit_base_finetune", "mm_moco_v3_vit_large_finetune")


def probe_gap(golden: str, *change: str) -> float:
    """Largest difference from a golden learning rate, relative to the largest rate."""
    spec = config.load(PROBES[golden], (*CHANGED.get(golden, ()), *change))
    steps = STEPS_PER_EPOCH.get(golden) or spec.train.steps_per_epoch(IMAGES)
    plan = Plan(spec, steps)
    if f"{golden}/iter" in EVAL:
        at = EVAL[f"{golden}/iter"]
    else:
        # Within an epoch the rate stays: the last step of an epoch has that of the first.
        at = EVAL[f"{golden}/epoch"] * steps + steps - 1
    assert at[-1] < plan.total_steps <= at[-1] + steps
    want = EVAL[f"{golden}/lr"]
    own = np.array([plan.hyper(int(step)).lr for step in at])
    return float(np.abs(own - want).max() / want.max())


@pytest.mark.parametrize("golden", PROBES)
def test_schedules_of_evaluation_are_the_published_ones(golden):
    # mmpretrain computes each rate from the one before, so that its rounding adds up.
    assert probe_gap(golden) <= (2e-12 if golden in RECURSIVE else 2e-15)


@pytest.mark.parametrize(
    ("golden", "change"),
    [
        ("deit_finetune_150ep_b1024", "lag_epochs=0"),
        ("deit_finetune_150ep_b1024", "warmup_shifts_cosine=true"),
        ("deit_finetune_150ep_b1024", "warmup_start_lr=0.0"),
        ("mm_moco_v3_vit_base_finetune", "warmup_reaches_peak=false"),
        ("mm_moco_v3_vit_base_finetune", "warmup_start_lr=0.0"),
        ("moca_finetune_readme", "end_lr=0.0"),
        ("moco_v3_linear_vit", "per=step"),
        ("moco_v1v2_linear", "milestones=[60, 81]"),
    ],
)
def test_the_comparison_sees_another_schedule_of_evaluation(golden, change):
    assert probe_gap(golden, f"optim.{change}") > 1e-6


def test_a_warm_up_of_one_step_that_reaches_its_peak_is_at_it():
    reached = plan("optim.warmup_steps=1", "optim.warmup_reaches_peak=true")
    assert reached.hyper(0).lr == reached.hyper(1).lr == 1e-3


def test_a_warm_up_in_steps_starts_where_it_is_told_and_reaches_the_peak_at_its_last_step():
    other = ("optim.warmup_reaches_peak=true", "optim.warmup_start_lr=1e-4")
    for schedule in ("cosine", "constant"):
        reached = plan(*other, f"optim.schedule={schedule}")
        rates = [reached.hyper(step).lr for step in (0, 29, 30)]
        assert rates == pytest.approx([1e-4, 1e-3, 1e-3], rel=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["optim.lag_epochs=1"], "optim.lag_epochs: 1: only with per epoch, or 0"),
        (
            ["optim.schedule=constant", "optim.warmup_shifts_cosine=false"],
            "optim.warmup_shifts_cosine: schedule constant has no cosine",
        ),
    ],
)
def test_keys_that_the_schedule_lacks_are_errors(change, message):
    with pytest.raises(UserError, match=message):
        plan(*change)
