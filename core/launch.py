"""From a spec to an engine: the processes of a run, its backend, its threads.

A command calls ``choose_backend``, ``join`` and ``open_engine`` in this order.
"""

import os
import sys
from collections.abc import Callable, Mapping
from types import ModuleType

import numpy as np
from threadpoolctl import threadpool_limits

from triptych import backends
from triptych.core.config.spec import LinearSpec, ParallelSpec, RunSpec
from triptych.core.contracts import ALONE, Array, Ranks, State
from triptych.core.engine import Engine
from triptych.core.errors import UserError
from triptych.core.machine.devices import prepare_libraries
from triptych.core.machine.launchers import (
    LONG,
    check_launcher,
    check_meeting,
    launched,
    told_after,
    waiting,
)
from triptych.core.machine.resources import cpu_threads
from triptych.core.parallel.degrees import check_supported, check_world
from triptych.core.parameters import table

REFERENCE = "numpy"
"""Name of the float64 reference, used like a backend's name."""
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
Say = Callable[[str], None]


def refuse_launchers(what: str = "this command") -> None:
    """Raises UserError if a launcher has started several processes. Only the first says why.

    Args:
        what: runs in one process.
    """
    place = launched()
    if place.variables is not None:
        reason = (
            f"{place.variables.world}={place.world}: {what} runs in one process; start it without "
            "a launcher"
        )
        raise UserError("" if place.rank else reason)


def join(spec: RunSpec, name: str) -> Ranks:
    """The processes that a launcher has started for this run. The call waits for all of them.

    Args:
        name: a backend's name. Its framework is loaded if there are several processes.

    Raises:
        UserError: the degrees of parallelism, the backend or the launcher do not fit.
    """
    place = launched()
    check_launcher(name, place)
    check_layout(spec, name, place.world)
    if place.world == 1:
        return ALONE
    check_meeting(place)
    module = load(spec, name)
    with told_after(LONG, waiting(place)):
        ranks: Ranks = module.join(spec)
    return ranks


def sharing_images(spec: RunSpec) -> RunSpec:
    """The spec of an evaluation. Each process that a launcher has started has the whole model.

    The layout of the training that the spec describes does not count.
    """
    parallel = ParallelSpec(data=launched().world)
    return spec.model_copy(update={"parallel": parallel})


def quiet(line: str) -> None:
    """Prints nothing: for use from a program, and for the ranks beside the main one."""


def choose_backend(asked: str | None, spec: RunSpec, say: Say = print) -> str:
    """The backend of a run.

    Args:
        asked: the command line's backend; None: the spec's, else the first installed one.

    Raises:
        UserError: no backend is installed.
    """
    name = asked or spec.backend
    if name is None:
        installed = backends.installed()
        if not installed:
            raise UserError("backend: none is installed; run: pip install 'triptych[torch]'")
        name = installed[0]
        say(f"backend: {name}, the first installed")
    return name


def check_layout(spec: RunSpec, name: str, world: int) -> None:
    """Checks that a backend can divide a run among the processes that run.

    Args:
        name: a backend's name.
        world: number of processes.

    Raises:
        UserError: the backend lacks a kind of parallelism, or the degrees need another number.
    """
    check_supported(spec, name, backends.PARALLEL.get(name, ()))
    check_world(spec, world)


def load(spec: RunSpec, name: str) -> ModuleType:
    """The backend's package. Its framework is imported with the spec's threads and precision.

    Args:
        name: a backend's name, or ``REFERENCE``.

    Raises:
        UserError: as in ``backends.load``.
    """
    _set_threads(cpu_threads(spec))
    if name == REFERENCE:
        from triptych.core import reference  # autograd is slow to import, and no backend needs it

        return reference
    if name not in sys.modules:
        prepare_libraries(spec.precision)
    return backends.load(name)


def _set_threads(count: int) -> None:
    """Sets the threads of NumPy and of a framework that is not imported yet."""
    for variable in THREAD_VARIABLES:
        os.environ[variable] = str(count)
    # NumPy's threads would otherwise wait for work on every core beside those of OneFlow.
    threadpool_limits(count, user_api="blas")


def open_engine(
    spec: RunSpec,
    name: str,
    state: State,
    *,
    whole: bool = False,
    origin: str = "state",
    ranks: Ranks = ALONE,
) -> Engine:
    """An engine that holds a copy of ``state``.

    Args:
        name: a backend's name, or ``REFERENCE``.
        state: canonical tensors.
        whole: whether to set the optimizer from the entries ``optimizer.*``, too. Otherwise these
            are ignored and the optimizer is fresh.
        origin: the file or folder of the state, for messages.
        ranks: the processes that train together, as ``join`` gives them.

    Raises:
        UserError: the machine lacks the backend, device or precision, or the backend a kind of
            parallelism. Or tensors are missing or
            have wrong shapes, or a whole state has further tensors; each has a line.
    """
    check_supported(spec, name, backends.PARALLEL.get(name, ()))
    module = load(spec, name)
    shapes = {param.name: tuple(param.shape) for param in table(spec)}
    problems = [f"missing {tensor} {shapes[tensor]}" for tensor in shapes if tensor not in state]
    problems += [
        f"{tensor}: expected {shape}, got {state[tensor].shape}"
        for tensor, shape in shapes.items()
        if tensor in state and state[tensor].shape != shape
    ]
    if problems:
        raise UserError("\n".join(f"{origin}: {problem}" for problem in problems))
    engine: Engine = module.build(spec, {tensor: state[tensor] for tensor in shapes}, ranks)
    if whole:
        try:
            engine.import_state(state)
        except ValueError as error:
            engine.close()
            lines = str(error).splitlines()
            raise UserError("\n".join(f"{origin}: {line}" for line in lines)) from error
    return engine


def open_classifier(spec: RunSpec, name: str, state: State, ranks: Ranks = ALONE) -> Engine:
    """``open_engine`` for a whole network that is evaluated and not trained."""
    return open_engine(_inferring(spec), name, state, ranks=ranks)


def _inferring(spec: RunSpec) -> RunSpec:
    """The spec of an engine that does not train: float32 in the place of mixed precision.

    Every backend has float32. A compilation would take longer than it saves.
    """
    mixed = spec.precision in ("bfloat16", "float16")
    train = spec.train.model_copy(update={"compile": False})
    precision = "float32" if mixed else spec.precision
    return spec.model_copy(update={"train": train, "precision": precision})


def open_encoder(
    spec: RunSpec,
    name: str,
    state: Mapping[str, Array],
    branch: str,
    *,
    origin: str = "state",
    ranks: Ranks = ALONE,
) -> Engine:
    """An engine that holds one encoder alone, as its student: no teacher, heads or memory.

    It is a linear probe, whose encoder has no gradient and no optimizer. The classifier, which
    nothing uses, has two rows of zeros.

    Args:
        name: a backend's name, or ``REFERENCE``.
        state: canonical tensors, with those of the encoder.
        branch: "student" or "teacher".
        origin: the file or folder of the state, for messages.
        ranks: as in ``open_engine``.

    Raises:
        UserError: the method has no such branch; or as in ``open_engine``.
    """
    ours, theirs = "student.encoder.", f"{branch}.encoder."
    if not any(param.name.startswith(theirs) for param in table(spec)):
        raise UserError(
            f"evaluate.branch: {branch}: method {spec.method.name} has none as the spec sets it"
        )
    if not any(key.startswith(theirs) for key in state):
        raise UserError(f"evaluate.branch: {branch}: {origin} holds no such encoder")
    method = LinearSpec(name="linear", classes=2)
    alone = _inferring(spec).model_copy(update={"method": method})
    chosen: State = {}
    for param in table(alone):
        source = param.name.replace(ours, theirs, 1)
        if not param.name.startswith(ours):
            chosen[param.name] = np.zeros(param.shape, np.float32)
        elif source in state:
            chosen[param.name] = state[source]
    return open_engine(alone, name, chosen, origin=origin, ranks=ranks)
