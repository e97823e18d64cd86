"""Writes the state of an optimizer as the files of other systems hold it (see ``moments``)."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from triptych.core.config.spec import LarsSpec
from triptych.core.errors import UserError
from triptych.core.files.tree import Node, Stored
from triptych.core.formats.entries import BETAS, Key
from triptych.core.formats.format import Output, facts_of
from triptych.core.formats.moments import KINDS, STEP, Moments, in_form, parameters
from triptych.core.parameters import table


def optimizer_state(moments: Moments, output: Output) -> Node:
    """The entry of a file that holds the state of the optimizer.

    Args:
        moments: of the file's format.
        output: its tensors are in the order of the system's own model (``Layout.ordered``), and
            have unique names where the links are by name.

    Raises:
        UserError: files of this format hold no optimizer of this kind.
    """
    optim = output.spec.optim
    if optim.name not in moments.optimizers:
        known = " or ".join(moments.optimizers)
        raise UserError(
            f"optim.name: {optim.name}: files of this format hold the state of {known}; leave out "
            "the optimizer"
        )
    state = _moments(moments, output)
    if moments.link == "flat":
        return _flat(state, output)
    return _grouped(state, moments, output)


def _moments(moments: Moments, output: Output) -> dict[str, dict[str, Node]]:
    """The moments of each parameter, by its name in the file."""
    state: dict[str, dict[str, Node]] = {}
    optim, name = output.spec.optim, output.spec.optim.name
    form = optim.form if isinstance(optim, LarsSpec) else moments.form
    lr = moments.options(output.spec, 0).get("lr")
    for kind, theirs in zip(KINDS[name], moments.optimizers[name], strict=True):
        prefix = f"optimizer.{kind}."
        ours = {
            key.removeprefix(prefix): in_form(tensor, form, moments.form, lr)
            for key, tensor in output.optimizer.items()
            if key.startswith(prefix)
        }
        written, _ = output.layout.table.from_canonical(ours, facts_of(output.spec))
        for param, tensor in written.items():
            state.setdefault(param, {})[theirs] = tensor
    return state


def _grouped(
    state: Mapping[str, Mapping[str, Node]], moments: Moments, output: Output
) -> dict[str, Node]:
    groups = moments.groups(parameters(output.tensors, _canonical_names(output)))
    flat = [param.name for group in groups for param in group]
    keys: dict[str, Key] = {
        name: i if moments.link == "number" else output.tensors[name].unique
        for i, name in enumerate(flat)
    }
    count = _count(output)
    entries: dict[Key, Node] = {}
    if moments.step == "shared":
        entries["step"] = count
    for name in flat:
        if name in state:
            entries[keys[name]] = {**_step(moments, output), **state[name]}
    return {
        "state": entries,
        "param_groups": [
            {**moments.options(output.spec, i), "params": [keys[param.name] for param in group]}
            for i, group in enumerate(groups)
        ],
    }


def _step(moments: Moments, output: Output) -> dict[str, Node]:
    """The number of updates beside the moments. Only AdamW counts them."""
    if moments.step == "shared" or output.spec.optim.name != "adamw":
        return {}
    count = _count(output)
    # A new scalar each time: equal objects would share their storage in the file.
    return {"step": Stored.of(np.float32(count).reshape(())) if moments.step == "tensor" else count}


def _count(output: Output) -> int:
    if STEP in output.optimizer:
        return int(output.optimizer[STEP].array())
    return output.step or 0


def _canonical_names(output: Output) -> dict[str, str]:
    """Canonical name of each parameter, by its name in the file."""
    known = {p.name: output.layout.table.theirs(p.name) for p in table(output.spec)}
    return {theirs: ours for ours, found in known.items() if found for theirs in found[0]}


def _flat(state: Mapping[str, Mapping[str, Node]], output: Output) -> dict[str, Node]:
    """Paddle's own form, with the powers of the betas before the next update."""
    entries: dict[str, Node] = {}
    powers: dict[str, Node] = {}
    optim, count = output.spec.optim, _count(output)
    betas = optim.betas if optim.name == "adamw" else ()
    for name, kinds in state.items():
        unique = output.tensors[name].unique
        for kind, tensor in kinds.items():
            key = f"{unique}_{kind}_0"
            entries[key] = replace(tensor, unique=key)
        for kind, beta in zip(BETAS, betas, strict=False):
            key = f"{unique}_{kind}_0"
            power = np.array([beta ** (count + 1)], np.float32)
            powers[key] = Stored.of(power, unique=key)
    return {**entries, **powers}
