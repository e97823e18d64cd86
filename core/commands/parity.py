"""``parity trace | compare | run``: shows that every framework computes the same numbers."""

import argparse
from pathlib import Path

import numpy as np

from triptych.core import cli, config, formats
from triptych.core.config.spec import RunSpec
from triptych.core.errors import NonFiniteError, UserError
from triptych.core.launch import REFERENCE, choose_backend, refuse_launchers
from triptych.core.machine.devices import on_compared_device
from triptych.core.parity.trace import run_trace, save


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the three subcommands."""
    modes = parser.add_subparsers(dest="mode", required=True, metavar="trace|compare|run")
    trace = modes.add_parser("trace", help="record losses, gradients and states of a few steps")
    cli.add_spec_arguments(trace, required=False)
    cli.add_backend_argument(
        trace, "numpy", default="the spec's, else the first installed; numpy: float64 reference"
    )
    trace.add_argument(
        "--weights",
        type=cli.path,
        metavar="PATH",
        help="default: the spec's seed; without -c, the file shows the spec",
    )
    trace.add_argument(
        "--inputs",
        type=cli.path,
        metavar="NPZ",
        help="view1, view2, draws; of a supervised method: images, labels, draws",
    )
    trace.add_argument("--hyper", type=cli.path, metavar="JSON", help="fixed lr, weight_decay, ema")
    trace.add_argument("--steps", type=int, default=3, metavar="N")
    trace.add_argument("--dtype", choices=("float64", "float32"), default="float64")
    trace.add_argument("--output", type=cli.path, metavar="NPZ", help="same as -o FILE.npz")
    compare = modes.add_parser("compare", help="compare two records")
    compare.add_argument("a", type=cli.path)
    compare.add_argument("b", type=cli.path, help="the reference of relative errors")
    compare.add_argument(
        "--tolerance", nargs="+", default=[], metavar="KIND=VALUE", help="e.g. loss=1e-10 grad=1e-8"
    )
    compare.add_argument("--most", type=int, default=10, metavar="N", help="rows to print")
    run = modes.add_parser("run", help="train one spec on every installed backend, then report")
    cli.add_spec_arguments(run)
    run.add_argument("--backends", metavar="A,B", help="default: all installed")
    run.add_argument("--output", type=cli.path, default=Path("runs/parity"), metavar="DIR")
    run.add_argument(
        "--resume", choices=("auto",), help="go on with the runs that are in --output already"
    )


def run(arguments: argparse.Namespace) -> int:
    """Runs one subcommand; "compare" returns 1 if a difference is larger than allowed."""
    return {"trace": _trace, "compare": _compare, "run": _run}[arguments.mode](arguments)


def _trace(arguments: argparse.Namespace) -> int:
    refuse_launchers()
    overrides, output = _split_o(arguments)
    numpy = arguments.backend == REFERENCE
    dtype = "float64" if numpy else arguments.dtype  # the reference has no other precision
    overrides.append(f"precision={dtype}")
    spec = on_compared_device(_trace_spec(arguments, overrides))
    if arguments.steps < 1:
        raise UserError(f"--steps {arguments.steps}: expected at least 1")
    backend = REFERENCE if numpy else choose_backend(arguments.backend, spec)
    record = run_trace(
        spec,
        backend,
        arguments.steps,
        weights=arguments.weights,
        inputs=arguments.inputs,
        hyper=arguments.hyper,
        say=cli.say,
    )
    save(record, output)
    losses = np.load(output)["loss"]
    print(f"{backend}, {dtype}: loss {' '.join(f'{x:.12g}' for x in losses)}")
    cli.say(f"wrote {output}")
    if not np.isfinite(losses).all():
        step = int(np.isfinite(losses).argmin()) + 1
        raise NonFiniteError(f"{output}: the loss of step {step} is not finite")
    return 0


def _trace_spec(arguments: argparse.Namespace, overrides: list[str]) -> RunSpec:
    if arguments.config:
        return config.load(arguments.config, overrides)
    if arguments.weights:
        return formats.read_spec(arguments.weights, overrides)
    raise UserError("parity trace: expected -c SPEC or --weights PATH")


def _split_o(arguments: argparse.Namespace) -> tuple[list[str], Path]:
    """Splits the words after ``-o`` into KEY=VALUE pairs and the output file."""
    pairs = [item for item in arguments.overrides if "=" in item]
    files = [cli.path(item) for item in arguments.overrides if "=" not in item]
    files += [arguments.output] if arguments.output else []
    if len(files) != 1:
        raise UserError(
            f"-o: expected one output file, FILE.npz; got {', '.join(map(str, files)) or 'none'}"
        )
    return pairs, files[0]


def _compare(arguments: argparse.Namespace) -> int:
    from triptych.core.parity.compare import compare, spec_differences

    tolerances = dict(_tolerance(item) for item in arguments.tolerance)
    a, b = (formats.read_arrays(path) for path in (arguments.a, arguments.b))
    differences, noise = compare(a, b, tolerances)
    wrong = [d for d in differences if not d.ok]
    for key, values in sorted(spec_differences(a, b).items()):
        cli.say(f"the records are of different specs: {key} {values}")
    for d in differences[: max(arguments.most, 0)]:
        print(f"{'ok ' if d.ok else 'BAD'} {d.error:9.2e} (allowed {d.allowed:.0e})  {d.name}")
    print(
        f"{len(differences)} arrays compared, {len(wrong)} differ by more than allowed; "
        f"{len(noise)} left out, since their true gradient is zero"
    )
    return 1 if wrong else 0


def _tolerance(item: str) -> tuple[str, float]:
    kind, _, value = item.partition("=")
    try:
        number = float(value)
    except ValueError:
        number = float("nan")
    if kind not in ("loss", "metric", "feature", "grad", "state") or not number >= 0:
        raise UserError(
            f"--tolerance {item}: expected loss|metric|feature|grad|state=NUMBER, e.g. loss=1e-10"
        )
    return kind, number


def _run(arguments: argparse.Namespace) -> int:
    from triptych.core.training.everywhere import run as train_everywhere

    refuse_launchers()
    names = arguments.backends.split(",") if arguments.backends else None
    return train_everywhere(
        arguments.config, arguments.overrides, names, arguments.output, resume=arguments.resume
    )
