"""Processes end together if one of them fails, wherever it fails, and start from the same input."""

import json

import pytest
from support.processes import PipeRanks, together

from triptych.core.errors import NonFiniteError, Stopped, UserError
from triptych.core.parallel import agreement
from triptych.core.parallel.agreement import check_same, program_digest


def said(mesh, work):
    """The kind and the text of the error in which some work ends, or its result."""
    try:
        return work(PipeRanks(mesh))
    except (UserError, NonFiniteError, Stopped, OSError) as error:
        return type(error).__name__, str(error)


def failing(ranks, place, error):
    """Two parts, of which both processes are at the same; rank 1 fails at ``place``."""
    done = []
    with agreement.whole(ranks):
        for number in range(2):
            if ranks.rank == 1 and place == f"before part {number}":
                raise error
            with agreement.part(ranks):
                if ranks.rank == 1 and place == f"in part {number}":
                    raise error
            done.append(number)
        if ranks.rank == 1 and place == "after the parts":
            raise error
    return done


@pytest.mark.parametrize(
    "place",
    ["before part 0", "in part 0", "before part 1", "in part 1", "after the parts"],
)
def test_a_failure_at_any_place_ends_all_with_its_text_told_once(place):
    def work(ranks):
        return failing(ranks, place, NonFiniteError("step 3: nan"))

    assert together(3, said, work) == [
        ("NonFiniteError", ""),
        ("NonFiniteError", "step 3: nan"),
        ("NonFiniteError", ""),
    ]


def test_without_a_failure_nothing_is_raised():
    assert together(2, said, lambda ranks: failing(ranks, "", None)) == [[0, 1]] * 2


@pytest.mark.parametrize(
    ("error", "kind", "others"),
    [
        (OSError(28, "disk full"), "OSError", "UserError"),
        (Stopped(), "Stopped", "Stopped"),
        (UserError("photo.jpg: damaged"), "UserError", "UserError"),
    ],
)
def test_the_other_processes_raise_a_kind_of_error_without_text(error, kind, others):
    def work(ranks):
        with agreement.together(ranks):
            if ranks.rank == 0:
                raise error

    assert together(2, said, work) == [(kind, str(error)), (others, "")]


def test_an_error_with_a_text_counts_more_than_one_without():
    """As in nested blocks, whose first process only repeats what the second has said."""

    def work(ranks):
        with agreement.together(ranks):
            raise UserError("" if ranks.rank == 0 else f"error of {ranks.rank}")

    kinds = ["", "error of 1", ""]
    assert together(3, said, work) == [("UserError", text) for text in kinds]


def test_different_input_is_refused_by_name_on_all_processes():
    def work(ranks):
        last = ranks.rank == 2
        folder = (
            "/data/größer" if last else "/data/a folder with a name that is too long to be shown"
        )
        model = {"depth": 12 - 9 * last, "stem": {"kind": "conv"} if last else None, "width": 8}
        values = {"seed": "0", "data": str(int(last)), "train": "{}", "folder": folder}
        check_same(ranks, {**values, "model": json.dumps(model)})

    first, *others = together(3, said, work)
    assert first[1].startswith(
        "the 3 processes differ in data (0 on process 0, 1 on process 2), folder, model.depth (12 "
        'on process 0, 3 on process 2), model.stem (null on process 0, {"kind": "conv"} on process '
        "2); start all of them"
    )
    assert others == [("UserError", "")] * 2


def test_the_digest_of_the_program_is_that_of_its_text(tmp_path, monkeypatch):
    (tmp_path / "core").mkdir()
    file = tmp_path / "core" / "engine.py"
    monkeypatch.setattr("triptych.core.__path__", [str(tmp_path / "core")])
    digests = []
    for text in ("a = 1", "a = 2", "a = 1"):
        file.write_text(text)
        digests.append(program_digest())
    assert digests[0] == digests[2] != digests[1]
