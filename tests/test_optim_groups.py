"""The groups of tensors: layer decay and decayed tensors of the published fine-tunings."""

import json

import numpy as np
import pytest
from support.golden_weights import GOLDEN
from support.native import tiny_spec

from triptych.core import config
from triptych.core.config.spec import RunSpec
from triptych.core.contracts import Hyper
from triptych.core.errors import UserError
from triptych.core.optim import groups
from triptych.core.optim.plan import Plan
from triptych.core.parameters import table

TABLES = json.loads((GOLDEN / "eval" / "finetune_groups.json").read_text())
HYPER = Hyper(step=0, lr=0.004, weight_decay=0.05, ema=0.0)


def spec(depth: int, **optim: object) -> RunSpec:
    """A ViT of some depth with AdamW and these keys."""
    base = tiny_spec(case="moco_v3_vit", model={"depth": depth}).model_dump()
    return RunSpec.model_validate({**base, "optim": {"name": "adamw", **optim}})


def canonical(name: str) -> str:
    """The canonical name of a tensor that timm or mmpretrain named."""
    if name.startswith("head."):
        return "student.classifier." + name.rpartition(".")[2]
    name = name.replace("backbone.layers.", "blocks.").replace("projection", "proj")
    for theirs, ours in (("ln1", "norm1"), ("ln2", "norm2")):
        name = name.replace(theirs, ours)
    name = name.replace("ffn.layers.0.0", "mlp.fc1").replace("ffn.layers.1", "mlp.fc2")
    name = name.replace("backbone.norm1", "norm").removeprefix("backbone.")
    return f"student.encoder.{name}"


@pytest.mark.parametrize("table", ["vit_base_readme", "vit_base_cls", "tiny"])
def test_layer_decay_is_that_of_the_golden_tables(table):
    given = TABLES[table]
    run = spec(
        given["depth"],
        layer_decay=given["layer_decay"],
        weight_decay=given["weight_decay"],
        decay_on="weights",
    )
    assert len(given["parameters"]) == 12 * given["depth"] + 8
    for name, ndim, scale, decay in given["parameters"]:
        group = groups.group(canonical(name), ndim, run)
        assert (group.scale, group.constant) == (scale, False), name
        assert groups.rates(group, run.optim, HYPER) == (0.004 * scale, decay), name


def test_mmpretrain_decays_the_same_tensors_at_one_rate():
    run = spec(12, weight_decay=0.05, decay_on="weights")
    rows = TABLES["mmpretrain"]["parameters"]
    assert len(rows) == 152
    for name, ndim, decay in rows:
        group = groups.group(canonical(name), ndim, run)
        assert groups.rates(group, run.optim, HYPER) == (0.004, decay), name


@pytest.mark.parametrize(
    ("rule", "decayed"),
    [
        ("all", {"cls_token", "blocks.0.norm1.weight", "blocks.0.mlp.fc1.weight"}),
        ("matrices", {"cls_token", "blocks.0.mlp.fc1.weight"}),
        ("weights", {"blocks.0.mlp.fc1.weight"}),
    ],
)
def test_rules_of_weight_decay(rule, decayed):
    run = spec(1, decay_on=rule)
    dimensions = {"cls_token": 3, "blocks.0.norm1.weight": 1, "blocks.0.mlp.fc1.weight": 2}
    found = {
        n for n, d in dimensions.items() if groups.group(f"student.encoder.{n}", d, run)[2] is None
    }
    assert found == decayed


def test_libai_decays_weights_and_class_token_only():
    base = tiny_spec(case="moco_v3_vit", method={"last_norm_affine": True}).model_dump()
    optim = {"name": "adamw", "decay_on": "matrices", "weight_decay": 0.1}
    run = RunSpec.model_validate({**base, "optim": optim})
    trained = [param for param in table(run) if param.trainable]
    decayed = [p.name for p in trained if groups.group(p.name, len(p.shape), run).decay is None]
    block, heads = "student.encoder.blocks.{}.", ("projector.0", "projector.3", "projector.6")
    parts = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert decayed == [
        "student.encoder.cls_token",
        *(f"{block.format(i)}{part}.weight" for i in range(2) for part in parts),
        *(f"student.{head}.weight" for head in (*heads, "predictor.0", "predictor.3")),
    ]


def test_a_group_without_properties_leaves_the_rates_as_scheduled():
    assert groups.rates(groups.Group(), spec(1).optim, HYPER) == (0.004, 0.05)
    assert groups.group("student.encoder.norm.weight", 1, spec(1)) == groups.Group()
    assert groups.rates(groups.Group(2.0, False, 0.1), spec(1).optim, HYPER) == (0.008, 0.1)


def test_groups_are_sorted_as_numbers_and_none():
    some = [groups.Group(s, c, d) for s in (1.0, 0.5) for c in (True, False) for d in (None, 0.0)]
    assert [group.order for group in sorted(some, key=lambda g: g.order)] == sorted(
        group.order for group in some
    )
    assert len({group.order for group in some}) == len(some)


def test_a_resnet_has_no_layer_decay():
    change = ["optim.name=adamw", "optim.layer_decay=0.65"]
    with pytest.raises(UserError, match=r"optim\.layer_decay: 0\.65: only a ViT has it"):
        config.load("moco_v3/digits_resnet", change)


def sweep(optim: dict[str, object], **method: object) -> RunSpec:
    """A linear probe of several rates."""
    base = tiny_spec(case="moco_v3_vit").model_dump()
    base["method"] = {"name": "linear", "classes": 3, **method}
    return RunSpec.model_validate({**base, "optim": optim})


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_each_probe_has_its_rate_and_decay(name):
    run = sweep(
        {"name": name, "lr": 0.1, "weight_decay": 0.0}, rates=(1.0, 2.0), weight_decays=(0.0, 1e-4)
    )
    found = [
        groups.rates(groups.group(f"student.classifier.{i}.{part}", ndim, run), run.optim, HYPER)
        for i in range(4)
        for part, ndim in (("weight", 2), ("bias", 1))
    ]
    want = [(0.004 * rate, decay) for rate in (1, 2) for decay in (0.0, 1e-4) for _ in range(2)]
    assert found == want


def test_a_single_probe_has_its_rate_and_the_scheduled_decay():
    run = sweep({"name": "sgd"}, rates=(3.0,))
    group = groups.group("student.classifier.weight", 2, run)
    assert groups.rates(group, run.optim, HYPER) == (0.012, 0.05)


def test_rates_of_mocas_grid_are_the_golden_ones():
    rates = tuple(digit * 10.0**power for power in range(-4, 1) for digit in range(1, 10))
    run = sweep(
        {"name": "sgd", "lr": 1.0, "weight_decay": 0.0, "per": "epoch", "scale_lr_by": 256},
        rates=rates,
    )
    train = {**run.train.model_dump(), "batch_size": 1024, "steps": None, "epochs": 100}
    run = RunSpec.model_validate({**run.model_dump(), "train": train})
    plan = Plan(run, 2)
    with np.load(GOLDEN / "eval" / "eval_schedules.npz") as golden:
        want = golden["moca_linear/lr"]
    found = np.empty_like(want)
    for epoch in range(len(want)):
        for i in range(len(rates)):
            group = groups.group(f"student.classifier.{i}.weight", 2, run)
            found[epoch, i] = groups.rates(group, run.optim, plan.hyper(2 * epoch + 1))[0]
    assert found.shape == (100, 45)
    np.testing.assert_allclose(found, want, rtol=1e-12, atol=1e-14)
