"""The figures of many cards: the page shows what the command counts, and small ones by hand."""

import json
from pathlib import Path

import pytest

from triptych.core import cli
from triptych.core.benchmarks import scaling
from triptych.core.benchmarks.scaling import Machine, plan, spec_of
from triptych.core.parameters.counts import parameter_counts

PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"


def test_the_page_shows_the_table_of_the_command(capsys):
    assert cli.main(["bench", "scaling"]) == 0
    assert capsys.readouterr().out in PAGE.read_text()


def counted(layout, *overrides, cards=8, machine=None):
    spec = spec_of("moco_v3/vit_base", cards, layout, overrides)
    return spec, plan(spec, "", layout, machine or Machine())


def test_the_memory_of_one_copy_on_each_card_by_hand():
    spec, found = counted("", "precision=float32")
    counts = parameter_counts(spec)
    gib, images = 2**30, 4096 // 8
    assert found.gradients * gib == 4 * counts.trainable
    assert found.moments == 2 * found.gradients
    assert found.activations * gib == 4 * images * 12 * 197 * 768 * 16
    assert found.pixels * gib == 4 * 2 * images * 3 * 224 * 224


def test_what_options_divide():
    _, whole = counted("")
    _, shared = counted("shard_optimizer=true")
    assert shared.moments == whole.moments / 8 and shared.memory < whole.memory
    _, again = counted("recompute=true")
    assert again.activations == pytest.approx(whole.activations * (1 / 16 + 1 / 12))
    assert again.compute > whole.compute
    _, parts = counted("", "train.accumulate=4")
    assert parts.activations == whole.activations / 4
    _, divided = counted("tensor=4")
    assert 0.25 < divided.weights / whole.weights < 0.3
    assert divided.activations == pytest.approx(whole.activations * 4 * (4 + 3) / 16)


def test_the_time_of_a_step_by_hand():
    machine = Machine(node=4, flops=100, link=200, network=10)
    _, within = counted("", cards=4, machine=machine)
    _, across = counted("", cards=8, machine=machine)
    assert across.compute == within.compute / 2
    assert within.exchange == within.data_traffic * 2**30 / 200e9
    assert across.exchange == across.data_traffic * 2**30 / 10e9
    assert across.per_second == 4096 / (across.compute + across.exchange)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cards", "6", "--layouts", "tensor=4"], "6 cards are not divisible by 4"),
        (["-c", "moca/v1_0_vit_base"], "only MoCo v3 of a ViT is counted"),
        (["--link", "0"], "must be positive"),
        (["--cards", "7"], "train.batch_size 4096 is not divisible by data 7"),
    ],
)
def test_bad_input_is_one_line(capsys, arguments, message):
    assert cli.main(["bench", "scaling", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("error: ") == 1


def test_json_has_each_figure(capsys):
    assert cli.main(["bench", "scaling", "--json", "--cards", "8", "--layouts", ""]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == len(scaling.RECIPES) and rows[0]["cards"] == 8
