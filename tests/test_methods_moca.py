"""MOCA: its masks, groups, words and order of one step, and what a spec may not ask of it."""

from dataclasses import replace

import numpy as np
import pytest
from conftest import assert_close
from support.golden_replay import disagreements, replay
from support.golden_weights import GOLDEN, description, official_state
from support.marks import marked
from support.native import draws, hyper, lively_state, random_batch, tiny_spec

from triptych.core import config, methods, parameters, reference
from triptych.core.config.method import rounds
from triptych.core.contracts import Hyper
from triptych.core.errors import UserError
from triptych.core.formats import FORMATS
from triptych.core.methods import masking
from triptych.core.optim import groups
from triptych.core.optim.plan import Plan
from triptych.core.parameters.counts import parameter_counts

CASE = "moca_vit_tiny"
RECIPE = "moca/v1_0_vit_base"


@pytest.mark.parametrize(
    ("side", "want"),
    [
        (4, ((7, 10), (4, 7))),
        (5, ((11, 16), (6, 11))),
        (7, ((22, 31), (12, 22))),
        (8, ((28, 41), (16, 28))),
        (14, ((88, 127), (49, 88))),
        (16, ((115, 166), (64, 115))),
    ],
)
def test_numbers_of_tokens_are_those_of_the_fact_sheet(side, want):
    assert rounds(side * side, (0.55, 0.75), (0.35, 0.55)) == want


def test_rounds_show_each_token_once_and_predict_the_same():
    one, two = rounds(196, (0.55, 0.75), (0.35, 0.55))
    order = np.argsort(np.random.default_rng(0).random((5, 196)), axis=1)
    second = masking.complementary(order, one, two)
    for a, b in zip(order, second, strict=True):
        assert sorted(b) == list(range(196))
        assert not set(a[: one.visible]) & set(b[: two.visible])
        assert set(a[one.visible : one.decoded]) == set(b[two.visible : two.decoded])


def test_golden_orders_are_complementary():
    one, two = rounds(64, (0.55, 0.75), (0.35, 0.55))
    with np.load(GOLDEN / f"{CASE}.npz") as golden:
        for step in range(3):
            first, second = (golden[f"mask_ids_round{i}/step{step}"] for i in (1, 2))
            np.testing.assert_array_equal(masking.complementary(first, one, two), second)
            assert golden[f"mask_len_keep_round1/step{step}"] == one.visible
            assert golden[f"mask_len_keep_round2/step{step}"] == two.visible


def test_the_interior():
    assert masking.interior((4, 5), 1).tolist() == [6, 7, 8, 11, 12, 13]
    assert len(masking.interior((14, 14), 2)) == 100
    assert len(masking.interior((3, 2), 0)) == 6


def test_draws():
    spec = tiny_spec(case="moca_vit")
    drawn = draws(spec, 3)
    assert list(drawn) == [
        "mask_ids_round1",
        "mask_ids_round2",
        "codebook_coin",
        "codebook_image_perm",
        "codebook_token_pick",
    ]
    assert drawn["mask_ids_round1"].shape == (16, 15)
    assert sorted(drawn["codebook_image_perm"]) == list(range(8))
    assert drawn["codebook_token_pick"].shape == (4,) and drawn["codebook_token_pick"].max() < 3
    assert 0 <= drawn["codebook_coin"] < 1
    again, other = draws(spec, 3), draws(spec, 4)
    assert all(np.array_equal(drawn[n], again[n]) for n in drawn)
    assert not np.array_equal(drawn["mask_ids_round1"], other["mask_ids_round1"])
    # The two views of an image are masked each by itself.
    assert not np.array_equal(drawn["mask_ids_round1"][:8], drawn["mask_ids_round1"][8:])


def test_words_come_from_the_first_rank_or_from_all():
    spec = config.load(RECIPE)
    one = methods.moca.draws(spec, 0)
    assert (len(one["codebook_token_pick"]), len(one["codebook_image_perm"])) == (4, 256)
    every = config.load(RECIPE, ["method.words_from=all_ranks"])
    all_ranks = methods.moca.draws(every, 0)
    assert (len(all_ranks["codebook_token_pick"]), len(all_ranks["codebook_image_perm"])) == (
        32,
        2048,
    )


@pytest.mark.parametrize(
    ("model", "depth", "trainable", "total", "entries"),
    [
        ("vit_base", 1, 93_923_072, 179_973_890, 345),
        ("vit_base", 2, 97_075_456, 183_126_274, 357),
        ("vit_base", 4, 103_380_224, 189_431_042, 381),
        ("vit_base", 8, 115_989_760, 202_040_578, 429),
        ("vit_large", 2, 317_807_616, 621_411_842, 645),
    ],
)
def test_published_sizes(model, depth, trainable, total, entries):
    spec = config.load(RECIPE, [f"model.name={model}", f"method.decoder_depth={depth}"])
    counts = parameter_counts(spec)
    assert (counts.trainable, counts.total) == (trainable, total)
    assert len(parameters.table(spec)) == entries


def test_groups_are_those_of_the_reference():
    spec = config.load(RECIPE)
    sizes = {}
    for param in parameters.table(spec):
        if param.trainable:
            group = groups.group(param.name, len(param.shape), spec)
            count, values = sizes.get(group, (0, 0))
            sizes[group] = count + 1, values + param.size
    assert sizes == {
        groups.Group(decay=0.0): (120, 138_496),
        groups.Group(): (60, 92_210_432),
        groups.Group(constant=True, decay=0.0): (7, 7_936),
        groups.Group(constant=True, decay=0.05): (5, 4_718_592),
    }


def test_groups_of_the_golden_case():
    spec = config.load(GOLDEN / "specs" / f"{CASE}.yaml")
    official = FORMATS["moca"].names(spec)
    found = {}
    for param in parameters.table(spec):
        if param.trainable:
            group = groups.group(param.name, len(param.shape), spec)
            found[official[param.name]] = groups.rates(group, spec.optim, Hyper(0, 2e-4, 0.05, 0.9))
    want = {
        name: (given["lr"], given["weight_decay"])
        for given in description(CASE)["param_groups"]
        for name in given["params"]
    }
    assert found == want


@pytest.mark.parametrize("version", ["v1_0", "v0_9"])
def test_rates_of_the_generators_follow_the_golden_table(version):
    spec = config.load(f"moca/{version}_vit_base")
    plan = Plan(spec, 625)
    with np.load(GOLDEN / "schedules.npz") as golden:
        table = {k: golden[f"moca_{version}_200ep/{k}"] for k in ("iter", "lr", "wd")}
        own = {k: golden[f"moca_{version}_200ep/{k}"] for k in ("lr_wgen", "wd_wgen")}
        none = golden[f"moca_{version}_200ep/wd_no_decay"]
    assert not none.any()
    for i, step in enumerate(table["iter"]):
        step_hyper = plan.hyper(int(step))
        got = groups.rates(groups.Group(constant=True, decay=0.05), spec.optim, step_hyper)
        assert got == (np.broadcast_to(own["lr_wgen"], len(none))[i], own["wd_wgen"].flat[0])
        got = groups.rates(groups.Group(), spec.optim, step_hyper)
        assert got == pytest.approx((table["lr"][i], table["wd"][i]), rel=1e-12, abs=1e-18)
        assert groups.rates(groups.Group(decay=0.0), spec.optim, step_hyper)[1] == 0.0


def test_initial_values():
    params = {p.name: p for p in parameters.table(config.load(RECIPE))}
    encoder = "student.encoder."
    bounds = {"patch_embed.proj.weight": 0.0625, "patch_embed.proj.bias": 0.03608}
    bounds["blocks.0.attn.qkv.weight"] = 0.04419
    for name, bound in bounds.items():
        assert params[encoder + name].init.value == pytest.approx(bound, rel=1e-3)
    assert params[encoder + "patch_embed.proj.weight"].trainable
    words = parameters.initial_value(params["memory.words"], 0).astype(np.float64)
    np.testing.assert_allclose((words**2).sum(1), 1.0, rtol=1e-5)
    assert (words >= 0).all() and 0.45 < (words == 0).mean() < 0.55


def test_position_tables_are_the_golden_ones():
    with np.load(GOLDEN / f"{CASE}.npz") as golden:
        for name, width in (("encoder", 96), ("decoder", 64)):
            table = parameters.sincos_2d(8, 8, width, column_first=True)
            np.testing.assert_allclose(table, golden[f"{name}_pos_embed"], rtol=0, atol=2e-7)
            assert np.abs(parameters.sincos_2d(8, 8, width) - table).max() > 0.5


def test_official_names_both_ways():
    spec = config.load(GOLDEN / "specs" / f"{CASE}.yaml")
    official = official_state(CASE)
    state = FORMATS["moca"].to_canonical(official, spec)
    assert {n: a.shape for n, a in state.items()} == {
        p.name: p.shape for p in parameters.table(spec)
    }
    for name in ("memory.pointer", "memory.updates"):
        assert state[name].dtype == np.int64
    back = FORMATS["moca"].from_canonical(state, spec)
    assert set(back) == set(official)
    for name, array in official.items():
        np.testing.assert_array_equal(back[name], array)
    again = FORMATS["moca"].to_canonical(back, spec)
    for name, array in state.items():
        assert again[name].dtype == array.dtype
        np.testing.assert_array_equal(again[name], array)
    with pytest.raises(UserError, match="hold moca"):
        FORMATS["moca"].names(tiny_spec())


@pytest.mark.parametrize(
    ("change", "key", "told"),
    [
        ("method.border=7", "method.border", "leave nothing of a grid of 14 x 14"),
        ("method.early_layer=12", "method.early_layer", "the model has 12 blocks"),
        ("method.mask_ratios=[0.55, 0.6]", "method.mask_ratios", "would overlap"),
        ("method.decoder_ratios=[0.6, 0.55]", "method.decoder_ratios", "round 1"),
        ("train.batch_size=16", "method.new_words", "only 2 images"),
        ("train.batch_size=100", "method.word_ranks", "not divisible by 8"),
        ("batch_norm.virtual_ranks=8", "batch_norm.virtual_ranks", "method.word_ranks"),
        ("method.new_words=33", "method.new_words", "not divisible by word_ranks 8"),
        ("method.words=2", "method.new_words", "more than the 2 words"),
        ("method.predictor_ratio=1e-9", "method.predictor_ratio", "leaves no hidden unit"),
        ("method.mask_ratios=[0.999, 0.75]", "method.mask_ratios", "shows 0 of 196"),
        ("method.decoder_heads=5", "method.decoder_heads", "not divisible by 5"),
        ("optim.schedule=constant", "optim.lr_epochs_mul", "schedule constant has none"),
    ],
)
def test_what_cannot_work_is_told_in_one_line(change, key, told):
    with pytest.raises(UserError) as error:
        config.load(RECIPE, [change])
    (line,) = str(error.value).splitlines()
    assert key in line and told in line


def test_one_word_is_none():
    with pytest.raises(UserError, match=r"method\.words: 1: batch norm"):
        config.load("moca/digits", ["method.words=1", "method.new_words=1"])


def test_generator_rate_is_for_moca():
    with pytest.raises(UserError, match="moco_v3 has no weight generators"):
        config.load("moco_v3/digits", ["optim.generator_lr=1e-4"])


# ------------------------------------------------------------------------------ wrong steps


def rows_first(state):
    name = "student.encoder.pos_embed"
    table = state[name].copy()
    table[0, 1:] = table[0, 1:].reshape(8, 8, -1).swapaxes(0, 1).reshape(64, -1)
    return {**state, name: table}


def decoder_rows_first(state):
    name = "student.decoder.pos_embed"
    table = state[name].copy()
    table[0, 1:] = table[0, 1:].reshape(8, 8, -1).swapaxes(0, 1).reshape(64, -1)
    return {**state, name: table}


def words_reversed(state):
    return {**state, "memory.words": state["memory.words"][::-1].copy()}


def pointer_moved(state):
    return {**state, "memory.pointer": np.array(8)}


def temperature_moved(state):
    return {**state, "memory.distance_used": state["memory.distance_used"] * 1.001}


CHANGES = [rows_first, decoder_rows_first, words_reversed, pointer_moved, temperature_moved]


@pytest.mark.one_backend
@pytest.mark.parametrize(
    "change", marked(CHANGES, (decoder_rows_first, pointer_moved), pytest.mark.soak)
)
def test_wrong_weights_are_noticed(backend, backend_name, change):
    assert disagreements(replay(backend_name, CASE, steps=1, change=change), CASE)


MOCA = methods.moca
PARTS = ("places", "targets", "predict", "loss")
HONEST = {name: getattr(MOCA, name) for name in (*PARTS, "prepare")}


def every(change):
    """All functions of the step, with another ``Step``."""
    return {
        name: lambda step, *rest, honest=HONEST[name]: honest(change(step), *rest) for name in PARTS
    }


def drawn(change):
    """All functions of the step, with other draws."""
    return every(lambda step: replace(step, draws={**step.draws, **change(step.draws)}))


def uncrossed(step, parts):
    """The bags of words are those of the same view."""
    targets = HONEST["targets"](step, parts)
    (values,) = targets.values
    half = len(values["bows"]) // 2
    values["bows"] = step.ops.concat([values["bows"][half:], values["bows"][:half]], axis=0)
    return targets


STEPS = {
    "views swapped": {
        "prepare": lambda batch, draws, spec: replace(batch, views=batch.views[::-1])
    },
    "other coin": drawn(lambda draws: {"codebook_coin": np.array(1.0 - draws["codebook_coin"])}),
    "rounds alike": drawn(lambda draws: {"mask_ids_round2": draws["mask_ids_round1"]}),
    "without EMA": every(lambda step: replace(step, hyper=replace(step.hyper, ema=1.0))),
    "codes of the same view": {"targets": uncrossed},
}


@pytest.mark.one_backend
@pytest.mark.parametrize("name", marked(STEPS, ("views swapped", "without EMA"), pytest.mark.soak))
def test_a_wrong_step_is_noticed(backend, backend_name, name, monkeypatch):
    for part, function in STEPS[name].items():
        monkeypatch.setattr(MOCA, part, function)
    assert disagreements(replay(backend_name, CASE, steps=1), CASE)


def test_the_codebook_takes_the_oldest_rows(backend):
    spec = tiny_spec(case="moca_vit")
    engine = backend.build(spec, lively_state(spec))
    before = engine.export_state()["memory.words"]
    for step in range(6):
        engine.train_step(random_batch(spec, step), draws(spec, step), hyper(step))
        after = engine.export_state()
        rows = {(4 * step + i) % 22 for i in range(4)}
        moved = {i for i in range(22) if not np.array_equal(after["memory.words"][i], before[i])}
        assert moved == rows
        assert int(after["memory.pointer"]) == 4 * (step + 1) % 22
        assert int(after["memory.updates"]) == step + 1
        assert_close(after["memory.distance_used"], after["memory.distance"], 0.0)
        before = after["memory.words"]


def test_chance_is_the_loss_of_the_best_constant_prediction():
    """Measured: no prediction that is the same for all images and tokens does better."""
    spec = tiny_spec(case="moca_vit", method={"mask_ratios": [0.6, 0.7]})
    engine = reference.build(spec, lively_state(spec))
    values, _ = engine.loss_and_grads(random_batch(spec), draws(spec), hyper())
    bows = values["feature/cross_view_bows"]
    mean = bows.mean(0)
    divergence = (bows * np.log(bows / mean)).sum(1).mean()
    told = float(values["word_entropy"] - values["bow_entropy"])
    assert told == pytest.approx(divergence, rel=1e-9)
    for other in np.abs(np.random.default_rng(0).normal(mean, 0.01, (20, len(mean)))):
        other = other / other.sum()
        assert (bows * np.log(bows / other)).sum(1).mean() >= divergence
    assert float(values["chance"]) >= divergence
