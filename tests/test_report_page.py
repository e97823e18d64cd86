"""Reading runs back, putting them side by side, and the page about them."""

import json
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from triptych.core import cli, config
from triptych.core.errors import UserError
from triptych.core.report import charts, page, table
from triptych.core.report.markup import document, element
from triptych.core.runs.record import BASELINES, read_run

HOSTILE = "</pre><script>alert('x')</script>&amp;\x00\"'<img src=http://example.org/x>"


def knn(step, top1, labels="all", tokens="cls"):
    return {
        "eval": "knn",
        "step": step,
        "labels": labels,
        "top1": top1,
        "k": 20,
        "temperature": 0.07,
        "tokens": tokens,
        "branch": "student",
    }


def losses(shift=0.0, steps=100):
    """A falling curve, 2.8 to about 1."""
    return [1 + 1.8 * np.exp(-step / 40) + shift * step for step in range(1, steps + 1)]


def write_run(path: Path, backend="torch", loss=None, overrides=(), finished=True, **versions):
    """A run directory as training leaves it."""
    path.mkdir(parents=True)
    spec = config.load("moco_v3/digits", [f"backend={backend}", *overrides])
    (path / "spec.yaml").write_text(config.dump(spec))
    rows = [
        {
            "step": i + 1,
            "loss": float(value),
            "chance": 2.7726,
            "state": "at chance" if i < 30 else "learning",
            "feature_std": 0.6,
            "gradient_norm": 1.5,
            "images_per_second": 900.0,
            "data_wait": 0.02,
        }
        for i, value in enumerate(losses() if loss is None else loss)
    ]
    rows += [knn(100, 0.94), knn(50, 0.81), knn(100, 0.83, 10)]
    write_lines(path / "metrics.jsonl", rows)
    baselines = [knn(0, 0.65), knn(0, 0.36, 10), knn(0, 0.986, tokens="raw pixels")]
    write_lines(path / BASELINES, baselines)
    result = {"backend": backend, "versions": {backend: "1.2", **versions}, "steps": 100}
    if finished:
        (path / "result.json").write_text(json.dumps({**result, "images_per_second": 912.4}))
    return path


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


class Page(HTMLParser):
    """Every tag, attribute and piece of text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.attributes, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def runs(tmp_path):
    return [
        read_run(write_run(tmp_path / "torch")),
        read_run(write_run(tmp_path / "oneflow", "oneflow", losses(1e-9))),
        read_run(write_run(tmp_path / "paddle", "paddle", losses(1e-4), finished=False)),
    ]


# ------------------------------------------------------------------------------------------- table


def test_table_compares_with_the_first_run(runs):
    rows = table.table(runs)
    assert [row.backend for row in rows] == ["torch", "oneflow", "paddle"]
    assert rows[0].difference is None
    assert rows[1].difference == pytest.approx(1e-7 / losses()[0], rel=1e-6)
    assert rows[0].first_loss == losses()[0] and rows[0].last_loss == losses()[-1]
    assert rows[0].images_per_second == 912.4 and rows[2].images_per_second is None


def test_table_tells_trained_from_baselines(runs):
    rows = table.table(runs)[0].evaluations
    top1 = {key: row.score for key, row in rows.items()}
    # Of the last step, whatever the order of the lines.
    assert top1["k-NN", "trained", "all labels"] == 0.94
    assert top1["k-NN", "random init", "10 per class"] == 0.36
    assert top1["k-NN", "raw pixels", "all labels"] == 0.986
    assert ("k-NN", "raw pixels", "10 per class") not in top1


def test_the_point_of_the_initial_weights_is_explained_where_it_is(tmp_path, runs):
    heading = "k-NN accuracy (step 0: random initial weights)"
    assert heading in page.render(runs)
    run = write_run(tmp_path / "without")
    (run / BASELINES).unlink()
    assert heading not in page.render([read_run(run)])


def test_evaluations_that_are_not_known_are_shown_by_name_and_top1(tmp_path, runs):
    run = write_run(tmp_path / "other")
    with (run / "metrics.jsonl").open("a") as file:
        for row in (
            {"eval": "detection", "step": 100, "top1": 0.712, "rate": 0.1},
            {"eval": "export", "step": 100, "file": "features.npz"},
        ):
            file.write(json.dumps(row) + "\n")
    other = read_run(run)
    assert other.evaluations[3].model_dump()["rate"] == 0.1
    rows = table.table([runs[0], other])
    shown = [dict(zip(table.headings(rows), table.cells(row, rows), strict=True)) for row in rows]
    assert [cells["detection % trained"] for cells in shown] == ["–", "71.2"]
    assert [cells["export % trained"] for cells in shown] == ["–", "–"]
    assert [cells["k-NN % trained"] for cells in shown] == ["94.0/83.0"] * 2
    seen = Page(page.render([runs[0], other]))
    assert seen.tags.count("figure") == 4, "loss, difference, k-NN, detection"
    assert "detection accuracy" in seen.text and "other: 71.2 %" in seen.text


def test_table_prints_as_many_cells_as_headings(runs):
    rows = table.table(runs)
    headings = table.headings(rows)
    assert headings[4] == "k-NN % trained"
    assert table.caption(rows).endswith(": all labels / 10 per class")
    assert table.cells(rows[1], rows)[3:5] == ["3.6e-08", "94.0/83.0"]
    for row in rows:
        assert len(table.cells(row, rows)) == len(headings)


def test_curves_without_a_common_step_have_no_difference(tmp_path, runs):
    other = read_run(write_run(tmp_path / "late"))
    late = [row.model_copy(update={"step": row.step + 1000}) for row in other.steps]
    moved = type(other)(other.path, other.spec, late, other.evaluations, other.result)
    assert table.difference(moved, runs[0]) is None


def test_runs_of_one_name_are_told_apart_by_path(tmp_path):
    records = [read_run(write_run(tmp_path / folder / "torch")) for folder in "ab"]
    assert len(set(table.unique_names(records))) == 2


# -------------------------------------------------------------------------------------------- page


def test_page_holds_every_run_and_needs_no_network(runs):
    seen = Page(page.render(runs))
    assert "script" not in seen.tags and "link" not in seen.tags and "img" not in seen.tags
    for name, value in seen.attributes:
        assert name not in ("src", "href", "action") and "url(" not in value
    assert seen.tags.count("figure") == 3
    for text in ("94.0/83.0", "3.6e-08", "at chance from step 1, learning from step 31"):
        assert text in seen.text
    assert "apart from the backend" in seen.text


def test_page_of_a_single_run_compares_nothing(runs):
    seen = Page(page.render(runs[:1]))
    assert seen.tags.count("figure") == 2
    assert "Relative difference" not in seen.text


def test_hostile_text_stays_text(tmp_path):
    path = write_run(
        tmp_path / "x<script>y",
        overrides=[f"data.root={json.dumps(HOSTILE.replace(chr(0), ''))}"],
        **{"<script>": HOSTILE},
    )
    seen = Page(page.render([read_run(path)]))
    assert "script" not in seen.tags and "img" not in seen.tags
    assert "<script>alert('x')</script>&amp;" in seen.text
    assert "\x00" not in page.render([read_run(path)])


def test_changed_keys_are_listed(tmp_path, runs):
    other = read_run(write_run(tmp_path / "other", overrides=["optim.lr=0.5"]))
    seen = Page(page.render([runs[0], other]))
    assert "optim.lr" in seen.text and "apart from the backend" not in seen.text


def test_command_writes_beside_the_runs(runs, tmp_path, capsys):
    assert cli.main(["report", *(str(run.path) for run in runs)]) == 0
    assert (tmp_path / "report.html").read_text().startswith("<!DOCTYPE html>")
    assert cli.main(["report", str(runs[0].path), "-o", str(tmp_path / "other.html")]) == 0
    assert (tmp_path / "other.html").exists()
    assert cli.main(["report", str(runs[0].path)]) == 0
    assert (tmp_path / "torch" / "report.html").exists()


def test_picture_is_a_whole_svg_file_of_its_own(runs, tmp_path):
    path = tmp_path / "curves.svg"
    page.write_picture(runs, path)
    root = ElementTree.parse(path).getroot()
    svg = "{http://www.w3.org/2000/svg}"
    assert root.tag == f"{svg}svg"
    assert len(list(root.iter(f"{svg}polyline"))) == 3
    text = "".join(root.itertext())
    assert all(name in text for name in ("torch", "oneflow", "paddle", "chance 2.773"))


def test_a_chance_level_that_moves_is_a_curve(tmp_path):
    run = write_run(tmp_path / "moving")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        if "chance" in row:
            row["chance"] += 0.01 * row["step"]
    write_lines(run / "metrics.jsonl", rows)
    page.write_picture([read_run(run)], tmp_path / "curves.svg")
    text = (tmp_path / "curves.svg").read_text()
    assert text.count("<polyline") == 2 and text.count("chance") <= 2


# -------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda run: (run / "metrics.jsonl").unlink(), "no metrics.jsonl"),
        (lambda run: (run / "spec.yaml").unlink(), "no spec.yaml"),
        (lambda run: (run / "spec.yaml").write_text("seed: [", "utf-8"), "spec.yaml"),
        (lambda run: (run / "spec.yaml").write_bytes(b"\xff\xfe\x00"), "spec.yaml"),
        (lambda run: (run / "metrics.jsonl").write_text(""), "no step has been logged"),
        (lambda run: (run / "metrics.jsonl").write_text("{]\n"), "line 1: damaged"),
        (lambda run: (run / "metrics.jsonl").write_text("[" * 99999 + "\n"), "line 1: damaged"),
        (lambda run: (run / "metrics.jsonl").write_text('"text"\n'), "expected a JSON object"),
        (lambda run: (run / "metrics.jsonl").write_text('{"step": 1}\n'), "loss"),
        (lambda run: (run / "metrics.jsonl").write_text('{"step": 1, "loss": NaN}\n'), "loss"),
        (lambda run: (run / "metrics.jsonl").write_text('{"step": -1, "loss": 2}\n'), "step"),
        (lambda run: (run / "metrics.jsonl").write_bytes(b"\xff\x00\n"), "not a text file"),
        (lambda run: (run / "result.json").write_text('{"backend"'), "result.json: damaged"),
        (lambda run: (run / "result.json").write_text("{}"), "result.json: backend"),
        (lambda run: (run / BASELINES).write_text('{"eval": "knn"}\n'), "step"),
    ],
)
def test_damaged_runs_are_named(tmp_path, capsys, spoil, words):
    run = write_run(tmp_path / "run")
    spoil(run)
    assert cli.main(["report", str(run)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith("error: ") for line in lines)
    assert any(words in line and str(run) in line for line in lines)


def test_missing_folder_and_file_are_named(tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    for name, words in (("nothing", "no such folder"), ("file", "not a folder"), ("", "no run")):
        path = tmp_path / name
        if not name:
            words = "not the folder of a run"
        with pytest.raises(UserError, match=words):
            read_run(path)


def test_last_line_in_the_making_is_left_out(tmp_path):
    run = write_run(tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 101, "lo')
    assert read_run(run).steps[-1].step == 100


def test_unwritable_output_is_bad_input(tmp_path, capsys):
    run = write_run(tmp_path / "run")
    assert cli.main(["report", str(run), "-o", str(tmp_path / "no" / "x.html")]) == 2
    assert "no/x.html" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------ charts


def test_ticks_are_round_and_inside():
    assert charts.round_values(0.0, 100.0) == [0, 20, 40, 60, 80, 100]
    assert charts.round_values(-0.3, 1.1) == pytest.approx([0, 0.5, 1.0])
    assert charts.Axis(1e-16, 1e-12, 0, 1, log=True).ticks() == pytest.approx(
        [1e-16, 1e-15, 1e-14, 1e-13, 1e-12]
    )


def test_axis_maps_its_ends():
    linear, log = charts.Axis(2, 4, 10, 30), charts.Axis(1e-4, 1e-2, 0, 100, log=True)
    assert (linear.at(2), linear.at(3), linear.at(4)) == (10, 20, 30)
    assert (log.at(1e-4), log.at(1e-3), log.at(1e-2)) == pytest.approx((0, 50, 100))
    assert log.at(0) == log.at(-1) == 0


def test_zeros_do_not_stretch_a_logarithmic_axis():
    points = [(1, 0.0), (2, 2e-7), (3, 3e-5)]
    series = [charts.Series("a", points, 0)]
    drawing = charts.Chart("t", "s", series, "x", "y", log=True).drawing()
    labels = [e.text for e in drawing.iter("text") if e.get("class") == "y"]
    assert labels == ["1e-07", "1e-06", "1e-05", "0.0001"]


def test_thinning_keeps_spikes_and_ends():
    points = [(float(i), 0.0) for i in range(100_000)]
    points[54_321] = (54_321.0, 9.0)
    kept = charts.thinned(points)
    assert len(kept) <= 2 * charts.BUCKETS + 2
    assert points[54_321] in kept and kept[0] == points[0] and kept[-1] == points[-1]
    assert kept == sorted(kept)


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize(
    "points", [[(1, 0.0)], [(1, 2.0), (2, 2.0)], [(1, -1.0), (2, 0.0)], [(1, 1e-300), (2, 1e300)]]
)
def test_extreme_curves_stay_on_the_canvas(points, log):
    figure = charts.Chart("t", "s", [charts.Series("a", points, 0)], "x", "y", log=log).figure()
    drawn = [e.get("points") for e in figure.iter("polyline")]
    numbers = [float(n) for text in drawn for pair in text.split() for n in pair.split(",")]
    assert len(numbers) == 2 * len(points)
    assert all(0 <= n <= charts.WIDTH for n in numbers)


def test_chart_without_points_is_empty_but_whole():
    figure = charts.Chart("t", "s", [charts.Series("a", [], 0)], "x", "y").figure()
    assert not list(figure.iter("polyline")) and list(figure.iter("svg"))


def test_markup_escapes_text_and_attributes():
    text = document(element("p", "a<b>", element("b", "&"), "c", title='"<'))
    assert text == '<!DOCTYPE html>\n<p title="&quot;<">a&lt;b&gt;<b>&amp;</b>c</p>\n'
    assert "\ud800" not in document(element("p", "\ud800\x01"))
