"""``data.labelled``: how many labels a run or an evaluation uses."""

from collections.abc import Callable

import numpy as np
import pytest
from support.data_specs import keys, labels, make_spec

from triptych.core import config
from triptych.core.config.spec import RunSpec
from triptych.core.data import open_splits
from triptych.core.data.picks import draw
from triptych.core.errors import UserError
from triptych.core.evaluation import shots
from triptych.core.evaluation.split import Split

DIGITS = {"name": "digits", "channels": 1}


def complaint(call: Callable[[], object]) -> str:
    """The message of the error that ``call`` raises."""
    with pytest.raises(UserError) as caught:
        call()
    return str(caught.value)


def supervised(**data: object) -> RunSpec:
    """The same run as a linear probe."""
    document = make_spec({**DIGITS, **data}).model_dump(mode="json")
    document["method"] = {"name": "linear", "classes": 10}
    document["augment"]["view2"] = []
    return RunSpec.model_validate(document)


def test_a_supervised_run_trains_on_the_drawn_images_only() -> None:
    whole = open_splits(supervised())
    few = open_splits(supervised(labelled=3))
    assert np.bincount(labels(few.train)).tolist() == [3] * 10
    assert set(keys(few.train)) < set(keys(whole.train))
    assert few.bank is few.train
    assert few.held_out is not None and len(few.held_out) == len(whole.held_out or ()) == 360


def test_they_are_the_images_that_lowshot_draws_with_this_seed() -> None:
    catalogue = Split(make_spec()).catalogue()
    for amount in (2, "5%"):
        bank = open_splits(supervised(labelled=amount)).bank
        drawn = shots.drawn(amount, 3, catalogue)
        assert keys(bank) == [catalogue.name(int(position)) for position in drawn.index]


def test_pretraining_uses_all_images_and_its_evaluation_the_drawn_ones() -> None:
    splits = open_splits(make_spec({**DIGITS, "labelled": "1%"}))
    assert len(splits.train) == 1437
    assert np.bincount(labels(splits.bank)).tolist() == [1] * 10


def test_more_images_than_a_class_has_are_named() -> None:
    spec = supervised(labelled=5000)
    assert complaint(lambda: open_splits(spec)).startswith("data.labelled: 5000: class '")


@pytest.mark.parametrize("amount", ["one", "0%", "101%"])
def test_amounts_that_cannot_be_are_one_line(amount: str) -> None:
    line = complaint(lambda: config.load("moca/digits", [f"data.labelled={amount}"]))
    assert f"data.labelled: '{amount}': expected a number, or a share like 1%" in line


def test_a_class_without_images_is_named() -> None:
    known = np.array([0, 0])
    line = complaint(lambda: draw(1, 0, known, ("a", "b"), key="data.labelled", of="data"))
    assert line == "data: no labelled image of 1 of the 2 classes: 'b'"
