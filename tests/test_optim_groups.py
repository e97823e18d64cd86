"""The groups of tensors: layer decay and decayed tensors of the published fine-tunings."""

import json

import pytest
from support.golden_weights import GOLDEN
from support.native import tiny_spec

from triptych.core import config
from triptych.core.config.spec import RunSpec
from triptych.core.contracts import Hyper
from triptych.core.errors import UserError
from triptych.core.optim import groups

TABLES = json.loads((GOLDEN / "finetune_groups.json").read_text())
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
