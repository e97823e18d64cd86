"""Summary of a spec without running it: model size, cost, schedule, chance level, every key."""

from typing import Any

from triptych.core.config import dump
from triptych.core.config.spec import AugmentOp, RunSpec
from triptych.core.data import open_train
from triptych.core.errors import UserError
from triptych.core.methods import METHODS
from triptych.core.optim.groups import own_rates
from triptych.core.optim.plan import Plan
from triptych.core.parameters.counts import (
    FLOPS_COUNTED,
    PARAMETERS_COUNTED,
    flops,
    parameter_counts,
)

ROWS = 9
"""Evenly spaced rows of the schedule table. The end of the warm-up is a further row."""


def summarize(spec: RunSpec, dataset_size: int | None = None) -> dict[str, Any]:
    """Everything that ``info -c`` shows, as plain data.

    Args:
        dataset_size: number of training images. None: they are counted, if the data is on this
            machine. Where the number stays unknown, the values that depend on it are None.

    Raises:
        UserError: the batch is larger than the dataset, or the warm-up longer than the run.
    """
    problem = None
    if dataset_size is None:
        try:
            dataset_size = len(open_train(spec))
        except UserError as error:
            problem = str(error)
    batch = spec.train.batch_size
    if dataset_size is not None and dataset_size < batch:
        raise UserError(f"train.batch_size: {batch}: larger than the dataset of {dataset_size}")
    steps_per_epoch = spec.train.steps_per_epoch(dataset_size) if dataset_size else None
    counts = parameter_counts(spec)
    return {
        "method": spec.method.name,
        "model": spec.model.name,
        "parameters": {**vars(counts), "counted": PARAMETERS_COUNTED},
        "flops": {"per_image": flops(spec), "counted": FLOPS_COUNTED},
        "batch_size": batch,
        "dataset_size": dataset_size,
        "dataset_problem": problem,
        "steps_per_epoch": steps_per_epoch,
        "total_steps": Plan(spec, steps_per_epoch).total_steps
        if steps_per_epoch
        else spec.train.steps,
        "chance": METHODS[spec.method.name].chance(spec),
        "schedule": schedule(spec, steps_per_epoch),
        "generators": generators(spec),
        "spec": spec.model_dump(mode="json"),
    }


def schedule(spec: RunSpec, steps_per_epoch: int | None) -> list[dict[str, Any]]:
    """About ten rows of the schedules, the first and the last step among them.

    Without ``steps_per_epoch`` the rows of a run given in epochs have no step, and those of a run
    given in steps have no epoch. A spec that mixes epochs with steps then has no rows.
    """
    optim, by_epoch = spec.optim, spec.train.epochs is not None
    by_steps = optim.warmup_steps or (optim.warmup_reaches_peak and optim.per == "step")
    needs_size = by_steps if by_epoch else optim.warmup_epochs or optim.per == "epoch"
    if steps_per_epoch is None and needs_size:
        return []
    # Of an unknown size, an epoch counts as one step: exact at the start of each epoch.
    plan = Plan(spec, steps_per_epoch or 1)
    warmup = plan.warmup * (plan.steps_per_epoch if by_epoch else 1)
    last = plan.total_steps - 1
    steps = {round(i * last / (ROWS - 1)) for i in range(ROWS)} | {min(round(warmup), last)}
    rows = []
    for step in sorted(steps):
        hyper = plan.hyper(step)
        rows.append(
            {
                "step": None if by_epoch and steps_per_epoch is None else step,
                "epoch": step / plan.steps_per_epoch if by_epoch or steps_per_epoch else None,
                "lr": hyper.lr,
                "weight_decay": hyper.weight_decay,
                "ema": hyper.ema,
            }
        )
    return rows


def generators(spec: RunSpec) -> dict[str, float] | None:
    """Constant rate and decay of MOCA's weight generators; None: they follow the schedules."""
    rates = own_rates(spec.optim)
    return dict(zip(("lr", "weight_decay"), rates, strict=True)) if rates else None


def render(summary: dict[str, Any]) -> str:
    """The summary as text for a terminal."""
    spec = RunSpec.model_validate(summary["spec"])
    return "\n".join(
        [
            *_sizes(summary),
            *_lengths(summary),
            "",
            *_table(summary["schedule"]),
            *_generators(summary["generators"]),
            "",
            *(line for i in range(spec.method.views) for line in _view(spec, f"view{i + 1}")),
            "",
            "resolved spec",
            *(f"  {line}" for line in dump(spec).splitlines()),
        ]
    )


def _sizes(summary: dict[str, Any]) -> list[str]:
    counts, cost = summary["parameters"], summary["flops"]
    per_image = cost["per_image"]
    short = f"{per_image / 1e9:.2f} G" if per_image >= 1e8 else f"{per_image / 1e6:.2f} M"
    return [
        f"{summary['method']} on {summary['model']}",
        f"parameters  {_millions(counts['total'])}",
        f"            {counts['counted']};",
        f"            encoder {_millions(counts['encoder'])}; "
        f"of all, {_millions(counts['trainable'])} have a gradient",
        f"cost        {short}FLOPs ({per_image:,})",
        f"            {cost['counted']}",
        _chance(summary),
    ]


def _chance(summary: dict[str, Any]) -> str:
    return f"chance      {METHODS[summary['method']].CHANCE.format(summary['chance'])}"


def _lengths(summary: dict[str, Any]) -> list[str]:
    train, total = summary["spec"]["train"], summary["total_steps"]
    size, per_epoch = summary["dataset_size"], summary["steps_per_epoch"]
    epochs = f"{train['epochs']:,} epochs" if train["epochs"] else ""
    steps = f"{total:,} steps" if total else ""
    stop = f"stops after step {train['stop_at']:,}" if train["stop_at"] else ""
    data = f"{size:,} images" if size else f"of unknown size ({summary['dataset_problem']})"
    return [
        f"batch       {summary['batch_size']:,}",
        f"dataset     {data}",
        f"epoch       {f'{per_epoch:,} steps' if per_epoch else 'unknown: give --dataset-size N'}",
        f"run         {', '.join(part for part in (epochs, steps, stop) if part)}",
    ]


def _table(rows: list[dict[str, Any]]) -> list[str]:
    if not rows:
        return ["schedule    unknown: it mixes epochs and steps; give --dataset-size N"]
    lines = [f"{'step':>9} {'epoch':>9} {'lr':>12} {'weight decay':>13} {'EMA':>10}"]
    for row in rows:
        step = "" if row["step"] is None else f"{row['step']:,}"
        epoch = "" if row["epoch"] is None else f"{row['epoch']:.2f}"
        lines.append(
            f"{step:>9} {epoch:>9} {row['lr']:>12.6g} {row['weight_decay']:>13.6g} "
            f"{row['ema']:>10.7f}"
        )
    return lines


def _generators(rates: dict[str, float] | None) -> list[str]:
    if rates is None:
        return []
    lr, decay = rates["lr"], rates["weight_decay"]
    return [f"generators of weights: lr {lr:g}, weight decay {decay:g} at every step"]


def _view(spec: RunSpec, name: str) -> list[str]:
    operations: tuple[AugmentOp, ...] = getattr(spec.augment, name)
    return [name if operations else f"{name}: no operation", *map(_operation, operations)]


def _operation(op: AugmentOp) -> str:
    options = op.model_dump(exclude={"op", "p"}).items()
    listed = ", ".join(f"{key} {_option(key, value)}" for key, value in options)
    return f"  p {op.p:<5g} {op.op}  {listed}".rstrip()


def _option(key: str, value: Any) -> str:
    if not isinstance(value, tuple):
        return str(value)
    joint = " " if key == "fill" else " to "
    return joint.join(f"{number:.4g}" for number in value)


def _millions(count: int) -> str:
    return f"{count / 1e6:.2f} M ({count:,})"
