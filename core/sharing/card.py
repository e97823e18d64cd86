"""The model card: what a model is, what it was trained on, how good it is, and how to open it."""

from collections.abc import Sequence

from triptych.core import __version__, config
from triptych.core.config.spec import RunSpec
from triptych.core.errors import printable
from triptych.core.evaluation.row import Evaluation
from triptych.core.parameters.counts import parameter_counts
from triptych.core.runs.record import RunRecord
from triptych.core.sharing.model import Model

Rows = Sequence[tuple[str, str]]


def render(model: Model, repo: str) -> str:
    """The card as Markdown, with the Hub's metadata at its top. No network is needed.

    Args:
        model: what is shared.
        repo: owner/name on the Hub.
    """
    spec, run = model.spec, model.run
    parts = [
        _metadata(spec),
        f"# {repo.rpartition('/')[2]}",
        f"{spec.method.name} on {spec.model.name}, trained with triptych {__version__}. It opens "
        "on PyTorch, OneFlow and PaddlePaddle.",
        _use(spec, repo),
        *_section("Model", _model(spec)),
        *_section("Data", _data(spec)),
        *_section("Training", _training(spec, run)),
        *_results(run),
        f"## Spec\n\n```yaml\n{config.dump(spec).rstrip()}\n```",
    ]
    return "\n\n".join(parts) + "\n"


def _metadata(spec: RunSpec) -> str:
    task = "image-classification" if spec.method.labelled else "image-feature-extraction"
    tags = ["triptych", "self-supervised-learning", spec.method.name, spec.model.name]
    lines = ["library_name: triptych", f"pipeline_tag: {task}", "tags:"]
    return "\n".join(["---", *lines, *(f"- {tag}" for tag in tags), "---"])


def _use(spec: RunSpec, repo: str) -> str:
    call = "predict(images)" if spec.method.labelled else "encode(images)   # (N, D)"
    code = f'from triptych.core import get_model\nget_model(weights="hf://{repo}").{call}'
    return f"## Use\n\n```python\n{code}\n```"


def _model(spec: RunSpec) -> Rows:
    counts, model = parameter_counts(spec), spec.model
    height, width = model.size
    return [
        ("method", spec.method.name),
        ("encoder", f"{model.name}, {counts.encoder:,} parameters, {model.features} features"),
        ("all networks", f"{counts.total:,} parameters"),
        ("images", f"{height} x {width}, {model.channels} channels"),
    ]


def _data(spec: RunSpec) -> Rows:
    mean, std = (
        ", ".join(f"{value:g}" for value in v) for v in (spec.augment.mean, spec.augment.std)
    )
    return [
        ("data set", " ".join(filter(None, (spec.data.name, spec.data.root, spec.data.list)))),
        ("normalised by", f"mean {mean}; deviation {std}"),
    ]


def _training(spec: RunSpec, run: RunRecord | None) -> Rows:
    train = spec.train
    rows = [
        ("length", f"{train.epochs:,} epochs" if train.epochs else f"{train.steps:,} steps"),
        ("batch", f"{train.batch_size:,} images"),
        (
            "optimizer",
            f"{spec.optim.name}, rate {spec.optim.lr:g}, decay {spec.optim.weight_decay:g}",
        ),
        ("precision", spec.precision),
    ]
    if run is None:
        return rows
    first, last = run.steps[0], run.steps[-1]
    rows.append(
        ("loss", f"{first.loss:.4g} at step {first.step:,}, {last.loss:.4g} at step {last.step:,}")
    )
    if result := run.result:
        versions = ", ".join(f"{name} {version}" for name, version in result.versions.items())
        rows.append(("backend", f"{result.backend} ({versions})" if versions else result.backend))
        rows.append(("device", result.device))
        if result.seconds is not None:
            rows.append(("time", f"{result.seconds:,.0f} s"))
    return rows


def _results(run: RunRecord | None) -> list[str]:
    """The newest row of each evaluation, and those of untrained features beside it."""
    newest = {
        (row.eval, row.variant, row.metric, row.features): row
        for row in (run.evaluations if run else ())
        if row.main and row.measured is not None
    }
    if not newest:
        return ["## Results\n\nNo evaluation has been recorded."]
    head = (
        "| evaluation | features | step | metric | measured on | value |\n|---|---|---|---|---|---|"
    )
    return ["\n".join(["## Results", "", head, *map(_result, newest.values())])]


def _result(row: Evaluation) -> str:
    title = " ".join(filter(None, (row.title, row.variant)))
    value = f"{row.measured:.2f} {row.sign}".strip()
    cells = (title, row.features, f"{row.step:,}", row.metric, row.measured_on, value)
    return f"| {' | '.join(map(_cell, cells))} |"


def _section(title: str, rows: Rows) -> list[str]:
    lines = [f"| {name} | {_cell(value)} |" for name, value in rows if value]
    return ["\n".join([f"## {title}", "", "| | |", "|---|---|", *lines])]


def _cell(text: str) -> str:
    return printable(text).replace("|", "\\|")
