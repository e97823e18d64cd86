"""``report``: one HTML page about some runs."""

import argparse
import os
from pathlib import Path
from xml.etree.ElementTree import Element

from triptych.core import cli
from triptych.core.data import open_splits
from triptych.core.errors import UserError
from triptych.core.evaluation import gallery
from triptych.core.formats import load_weights
from triptych.core.launch import (
    REFERENCE,
    choose_backend,
    open_classifier,
    open_encoder,
    refuse_launchers,
)
from triptych.core.optim.scaling import steps_behind
from triptych.core.report import page, pictures
from triptych.core.runs.record import RunRecord, read_run
from triptych.core.training.terminal import Terminal

IMAGES = 2000
"""Most held-out images of a run's pictures."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("runs", nargs="+", type=cli.path, metavar="RUN_DIR", help="folders of runs")
    parser.add_argument(
        "-o",
        "--output",
        type=cli.path,
        metavar="FILE",
        help="default: report.html in the run's folder, or in the one that holds all the runs",
    )
    parser.add_argument(
        "--picture", type=cli.path, metavar="FILE", help="also write the loss curves as an SVG file"
    )
    parser.add_argument(
        "--pictures",
        action="store_true",
        help="add pictures of each run's newest checkpoint: accuracy per class, mistakes, "
        "neighbours, maps of the features, attention",
    )
    parser.add_argument(
        "--images",
        type=int,
        default=IMAGES,
        metavar="N",
        help=f"with --pictures: most held-out images, and {gallery.BANK} times as many training "
        f"images; default: {IMAGES}",
    )
    cli.add_backend_argument(
        parser, REFERENCE, default="the run's, else the first installed; numpy: float64 reference"
    )


def run(arguments: argparse.Namespace) -> None:
    """Writes the page and says where.

    Raises:
        UserError: a folder holds no run, a file in it is damaged, the page cannot be written, or
            pictures are asked for and cannot be made.
    """
    if arguments.images < 1:
        raise UserError(f"--images {arguments.images}: expected a number from 1 on")
    records = [read_run(path) for path in arguments.runs]
    output = arguments.output
    if output is None:
        shared = os.path.commonpath([os.path.abspath(path) for path in arguments.runs])
        output = Path(os.path.relpath(shared)) / "report.html"
    made = [_pictures(record, arguments) for record in records] if arguments.pictures else []
    page.write(records, output, made)
    cli.say(f"wrote {output}")
    if arguments.picture:
        page.write_picture(records, arguments.picture)
        cli.say(f"wrote {arguments.picture}")


def _pictures(record: RunRecord, arguments: argparse.Namespace) -> list[Element]:
    """The pictures of a run's newest whole checkpoint."""
    refuse_launchers()
    spec, images = record.spec, gallery.draw(open_splits(record.spec), arguments.images)
    weights = load_weights(record.path, spec)
    step = steps_behind(weights)
    backend = choose_backend(arguments.backend, spec, cli.say)
    if spec.method.labelled:
        engine = open_classifier(spec, backend, weights)
    else:
        engine = open_encoder(spec, backend, weights, spec.evaluate.branch)
    del weights  # the engine has a copy of what it needs
    terminal = Terminal(len(images.queries) + len(images.bank), title="pictures")
    try:
        model = gallery.Model(spec, engine, step)
        return pictures.section(gallery.gather(model, images, terminal.advance))
    finally:
        terminal.close()
        engine.close()
