"""The evaluation split: features of both halves, and what becomes of damaged files."""

import numpy as np
import pytest
from support.data_specs import bad_exif, make_spec, write_images

from triptych.core.config.evaluate import EvaluateSpec
from triptych.core.contracts import Array
from triptych.core.data import split_digest
from triptych.core.errors import NonFiniteError, UserError
from triptych.core.evaluation import PROTOCOLS
from triptych.core.evaluation.split import Split
from triptych.core.evaluation.subject import Choice, Subject, raw_pixels

NAMES = [f"{kind}/{number}.png" for kind in ("cat", "dog") for number in range(3)]


@pytest.fixture
def spec(tmp_path):
    """Six labelled and six held-out images of two classes."""
    for half in ("train", "val"):
        write_images(tmp_path / half, NAMES)
    roots = {"root": str(tmp_path / "train"), "eval_root": str(tmp_path / "val")}
    made = make_spec({"name": "image_folder", "on_error": "skip", **roots})
    return made.model_copy(update={"evaluate": EvaluateSpec(k=4)})


def test_both_halves_have_features_and_labels(spec):
    split = Split(spec)
    features = split.features(raw_pixels())
    for half, source in ((features.bank, split.bank), (features.queries, split.queries)):
        assert half.features.shape == (6, 3 * 16 * 16)
        assert half.labels.tolist() == [0, 0, 0, 1, 1, 1]
        assert (half.digest, half.skipped) == (split_digest(source), [])
    assert features.digest == f"{features.bank.digest[:16]}-{features.queries.digest[:16]}"


def test_damaged_queries_are_named_once_counted_and_not_in_the_digest(spec, tmp_path):
    split = Split(spec)
    bad = [tmp_path / "val" / name for name in NAMES[:2]]
    for path in bad:
        path.write_text("broken")
    rows = [row for _ in range(2) for row in PROTOCOLS["knn"].rows(split, raw_pixels())]
    assert [(row.queries, row.bank, row.skipped) for row in rows] == [(4, 6, 2)] * 2
    assert rows[0].top1 == 1.0, "each query is also in the bank"
    assert split.damaged() == [str(path) for path in bad]
    split.features(raw_pixels())
    assert split.damaged() == []
    for path in bad:
        path.unlink()
    (clean,) = PROTOCOLS["knn"].rows(Split(spec), raw_pixels())
    assert clean.split == rows[0].split
    assert clean.skipped == 0


def test_a_split_without_a_readable_image_is_named(spec, tmp_path):
    for name in NAMES:
        (tmp_path / "val" / name).write_text("broken")
    with pytest.raises(UserError, match=r"all 6 images are damaged; the first is .*cat/0\.png"):
        PROTOCOLS["knn"].rows(Split(spec), raw_pixels())


def test_features_that_are_not_finite_are_no_row(spec):
    def embed(images: Array) -> Array:
        return np.full((len(images), 4), np.nan)

    with pytest.raises(NonFiniteError, match="after step 7"):
        PROTOCOLS["knn"].rows(Split(spec), Subject(embed, 7, Choice("student", "cls")))


def test_files_that_a_library_warns_of_are_kept_and_counted(spec, tmp_path):
    bad = [tmp_path / half / "cat" / "bad.jpg" for half in ("train", "val")]
    for path in bad:
        bad_exif(path)
    split = Split(spec)
    for _ in range(2):
        (row,) = PROTOCOLS["knn"].rows(split, raw_pixels())
        assert (row.image_warnings, row.bank, row.queries) == (2, 7, 7)
    warned = split.warnings()
    assert [name for name, _ in warned] == [str(path) for path in bad]
    assert all("EXIF" in text for _, text in warned)
