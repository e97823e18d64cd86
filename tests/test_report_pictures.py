"""The pictures in a run's page: what they show, and that the page stands alone."""

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

import numpy as np
import pytest
from PIL import Image
from test_evaluation_gallery import CLASSIFIERS, COMMON, made, opened

from triptych.core import checkpoint, config
from triptych.core.cli import main
from triptych.core.evaluation import gallery as core
from triptych.core.evaluation.gallery import Gallery, Half, Predictions
from triptych.core.launch import REFERENCE, open_encoder
from triptych.core.report import images, page, pictures, scatter
from triptych.core.report.markup import element
from triptych.core.runs.record import read_run

VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Images with their alternative text, table cells, text, and whether all tags are closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.images: list[dict[str, str]] = []
        self.cells: list[list[str]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag == "img":
            self.images.append(dict(attrs))
        if tag == "tr":
            self.cells.append([])
        if tag in ("td", "th"):
            self.cells[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.open and self.open[-1] in ("td", "th"):
            self.cells[-1][-1] += data


def parsed(gallery: Gallery) -> Page:
    text = page.document(element("main", *pictures.section(gallery)))
    found = Page(text)
    assert not found.open and "<script" not in text and "http" not in text
    assert all(image["src"].startswith("data:image/png;base64,") for image in found.images)
    assert all(image["alt"] for image in found.images)
    return found


def pixels(image: dict[str, str]) -> np.ndarray:
    data = base64.b64decode(image["src"].partition(",")[2])
    return np.asarray(Image.open(io.BytesIO(data)))


def test_a_vit_on_rectangular_images_shows_everything() -> None:
    spec, _, model = opened([])
    gallery = made(model)
    found = parsed(gallery)
    shown = {image["alt"]: image for image in found.images}
    rows, columns = spec.model.grid
    assert rows != columns
    queries = core.spread(gallery.queries.labels, pictures.SEEN)
    seen = np.concatenate(
        [
            pictures._images(gallery, gallery.queries, queries[i : i + 1])
            for i in range(len(queries))
        ]
    )
    attention = model.engine.attention(seen)[:, :, 1:].reshape(len(queries), 2, rows, columns)
    for i, name in enumerate(gallery.queries.names(queries)):
        for head, values in enumerate([attention[i].mean(0), *attention[i]]):
            alt = f"head {head}, of {name}" if head else f"attention, mean, of {name}"
            picture = shown[alt]
            np.testing.assert_array_equal(pixels(picture), images.heat(values / values.max()))
            assert (picture["width"], picture["height"]) == ("80", "53")
        colours = pixels(shown[f"PCA of the patches of {name}"])
        assert colours.shape == (rows, columns, 3)
        assert len(np.unique(colours.reshape(-1, 3), axis=0)) > 1
        want = images.unnormalized(seen[i], spec)
        np.testing.assert_array_equal(pixels(shown[name]), want)
    for title in ("Accuracy per class", "Confusion matrix", "Worst mistakes", "t-SNE", "PCA, "):
        assert title in found.text
    assert "student's class token" in found.text and "After step 5: 30 held-out" in found.text


def test_the_tables_hold_the_counts() -> None:
    _, _, model = opened(CLASSIFIERS["linear"], "moco_v3/digits_linear")
    gallery = made(model, 60)
    cells = parsed(gallery).cells
    counts = gallery.confusion
    assert counts.sum() == 60
    head = cells.index(["", *gallery.classes])
    for label, row in enumerate(cells[head + 1 : head + 11]):
        assert row == [str(label), *(str(count) if count else "" for count in counts[label])]
    accuracies = [row for row in cells if row[-1].endswith("%")]
    assert [row[0] for row in accuracies] == [
        str(label) for label in np.argsort(np.diag(counts) / counts.sum(1), kind="stable")
    ]
    for label, total, share in accuracies:
        row = counts[int(label)]
        assert total == str(row.sum())
        assert share == f"{100 * row[int(label)] / row.sum():.1f} %"


def with_predictions(gallery: Gallery, classes: int, labels: Any, predicted: Any) -> Gallery:
    """The gallery with other labels and predictions."""
    queries = gallery.queries
    changed = Half(queries.source, queries.index, queries.features, np.array(labels))
    even = np.full(len(labels), 0.5)
    return Gallery(
        gallery.model,
        tuple(f"class {i}" for i in range(classes)),
        changed,
        gallery.bank,
        True,
        Predictions("hand", np.array(predicted), even, even),
    )


def test_of_many_classes_the_most_confused_are_shown() -> None:
    _, _, model = opened([])
    labels = np.arange(60)
    predicted = labels.copy()
    predicted[50:60] = [51, 52, 53, 54, 55, 56, 57, 58, 59, 7]
    found = parsed(with_predictions(made(model, 60), 60, labels, predicted))
    head = next(i for i, row in enumerate(found.cells) if row[-1:] == ["others"])
    shown = [f"class {i}" for i in [*range(30), *range(50, 60)]]
    assert found.cells[head] == ["", *shown, "others"]
    rows = dict(zip(shown, found.cells[head + 1 : head + 41], strict=True))
    assert rows["class 7"].count("1") == 1
    assert rows["class 50"][1 + shown.index("class 51")] == "1"
    assert "Only the 40 classes" in found.text and "20 worst and the 20 best" in found.text
    worst = [image["alt"] for image in found.images if "taken for" in image["alt"]]
    assert len(worst) == 10 and worst[-1].endswith("class 59, taken for class 7")


def test_without_mistakes_and_without_labels_there_are_words() -> None:
    _, _, model = opened([])
    gallery = made(model, 10)
    labels = gallery.queries.labels
    assert "There is none." in parsed(with_predictions(gallery, 10, labels, labels)).text
    unknown = with_predictions(gallery, 0, np.full(10, -1), labels)
    unlabelled = Gallery(model, (), unknown.queries, gallery.bank, False, None)
    found = parsed(unlabelled)
    assert "An image has no label" in found.text and "Confusion" not in found.text
    assert "10 training images and 50" in found.text and "coloured" not in found.text


def test_a_residual_network_has_a_map_and_no_attention() -> None:
    resnet = ["model={name: resnet18, width: 2, stem: small, image_size: [16, 24], channels: 1}"]
    _, _, model = opened(resnet, "moco_v2/digits", COMMON)
    found = parsed(made(model, 10))
    assert "no class token, so there is no attention" in found.text
    assert "student's mean of the last map" in found.text
    maps = [image for image in found.images if image["alt"].startswith("PCA")]
    assert {pixels(image).shape for image in maps} == {(2, 3, 3)}
    assert not any("head" in image["alt"] for image in found.images)
    _, _, model = opened(["model.width=2", "model.image_size=8"], "moco_v2/digits", COMMON)
    assert "one position only" in parsed(made(model, 10)).text


def test_a_collapsed_encoder_has_a_page_too() -> None:
    spec, state, _ = opened([])
    state["student.encoder.norm.weight"] = np.zeros(8)
    model = core.Model(spec, open_encoder(spec, REFERENCE, state, "student"), 5)
    found = parsed(made(model, 20))
    assert "all features are equal" in found.text
    colours = [pixels(image) for image in found.images if image["alt"].startswith("PCA")]
    assert len(colours) == pictures.SEEN and all((each == 128).all() for each in colours)


def test_a_large_image_is_made_small_and_keeps_its_proportions() -> None:
    made = images.picture(np.zeros((300, 600, 3), np.uint8), images.fitted((600, 300), 80), "x")
    assert isinstance(made, Element) and pixels(made.attrib).shape == (80, 160, 3)
    assert (made.get("width"), made.get("height"), made.get("class")) == ("80", "40", None)


def test_names_of_classes_do_not_cover_each_other_and_stay_in_the_frame() -> None:
    """Classes whose points have nearly the same middle, one of them at the edge."""
    points = np.array([[0, 0], [0, 0.1], [0.1, 0], [0, -0.1], [9, 0], [-9, 0]], float)
    names = ["Pullover", "T-shirt/top", "Coat", "Shirt", "a long name at the edge", "Bag", "unseen"]
    figure = scatter.scatter("t-SNE", "6 images", points, np.arange(6), names)
    texts = [text for text in figure.iter("text")]
    assert sorted(text.text or "" for text in texts) == sorted(names[:-1])
    boxes = [(float(t.get("x", "")), float(t.get("y", "")), len(t.text or "")) for t in texts]
    for i, (x, y, length) in enumerate(boxes):
        assert scatter.LETTER * length / 2 <= x <= 400 - scatter.LETTER * length / 2
        for other_x, other_y, other in boxes[:i]:
            apart = abs(x - other_x) >= scatter.LETTER * (length + other) / 2 - 1
            assert apart or abs(y - other_y) >= scatter.LINE - 1
    legend = [item.text or "".join(item.itertext()) for item in figure.iter("li")]
    assert legend == names[:-1]
    colours = {path.get("stroke") for path in figure.iter("path")}
    assert len(colours) == 6 == len({dot.get("color") for dot in figure.iter("circle")} & colours)
    # Flat: the drawing is as high as its points need, and not a square.
    assert next(figure.iter("svg")).get("viewBox") == "0 0 400 160"
    many = scatter.scatter("PCA", "", points, np.arange(6), [str(i) for i in range(50)])
    assert len(list(many.iter("text"))) == 6
    crowd = np.random.default_rng(0).normal(size=(50, 2))
    many = scatter.scatter("PCA", "", crowd, np.arange(50), [str(i) for i in range(50)])
    assert not list(many.iter("text")) and not list(many.iter("li"))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run of one step on the digits."""
    spec, state, _ = opened(["evaluate.every=0"])
    path = tmp_path / "run"
    path.mkdir()
    (path / "spec.yaml").write_text(config.dump(spec))
    (path / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 2.0}) + "\n")
    checkpoint.write(path, 1, {**state, "optimizer.step": np.array(7)}, spec, {}, keep=1)
    return path


def test_the_command_adds_them_to_the_page(run: Path, capsys: Any) -> None:
    words = ["report", str(run), "--pictures", "--images", "12", "--backend", "numpy"]
    assert main(words) == 0, capsys.readouterr().err
    text = (run / "report.html").read_text()
    found = Page(text)
    assert "Pictures of run" in found.text and "After step 7: 12 held-out" in found.text
    assert "img-src data:" in text and len(found.images) > 60
    assert not re.search(r'(src|href)="(?!data:)', text)
    assert main(["report", str(run)]) == 0
    assert "Pictures of run" not in (run / "report.html").read_text()


def test_what_pictures_need_and_is_missing_is_one_line(run: Path, capsys: Any) -> None:
    def complaint(*options: str) -> str:
        assert main(["report", str(run), "--pictures", "--backend", "numpy", *options]) == 2
        error: str = capsys.readouterr().err
        assert all(line.startswith("error: ") for line in error.splitlines())
        return error

    assert "--images 0: expected a number from 1 on" in complaint("--images", "0")
    for file in (run / "checkpoints").rglob("*.safetensors"):
        file.write_bytes(b"damaged")
    assert "no whole checkpoint" in complaint()
    assert not (run / "report.html").exists()
    assert read_run(run).path == run
