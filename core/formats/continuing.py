"""What the state of a foreign optimizer gives to a run here: keys of the spec, and a state."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace

import numpy as np

from triptych.core.config.spec import LarsSpec, RunSpec
from triptych.core.contracts import State
from triptych.core.errors import UserError, printable
from triptych.core.files.tree import Malformed, Node
from triptych.core.formats.architecture import Shapes
from triptych.core.formats.moments import COUNTS, KINDS, STEP, Optimizer, Options, in_form
from triptych.core.parameters import table

Say = Callable[[str], None]

OPTIONS = {
    "betas": "betas",
    "eps": "eps",
    "momentum": "momentum",
    "trust_coefficient": "trust_coefficient",
    "eta": "trust_coefficient",
}
"""Keys of ``optim``, by names of hyper-parameters in files."""
KEYS = {
    "adamw": ("betas", "eps"),
    "sgd": ("momentum",),
    "lars": ("momentum", "trust_coefficient"),
}
"""Keys of ``optim`` that an optimizer has beyond rates and decay."""
FREEZABLE = {
    "model.freeze_patch_embed": "student.encoder.patch_embed.proj.weight",
    "model.freeze_positions": "student.encoder.pos_embed",
}
"""A tensor that has moments unless the key is true."""
SHOWN = 8
"""Number of entries that are named one by one."""
CLASS = "student.encoder.cls_token"


def sections(optimizer: Optimizer, shapes: Shapes) -> dict[str, object]:
    """The keys of the spec that the state of an optimizer shows, by dotted name.

    A file holds the rates of its last step and not the schedule behind them. The spec has the
    learning rate of that step, constant.

    Args:
        optimizer: of a file.
        shapes: of the model's tensors, by canonical name.

    Raises:
        UserError: a weight decay is no number.
    """
    found: dict[str, object] = {"optim.name": optimizer.name}
    if optimizer.options:
        values = optimizer.options[0].values
        named = {ours: values[theirs] for theirs, ours in OPTIONS.items() if theirs in values}
        found |= {f"optim.{k}": v for k, v in named.items() if k in KEYS[optimizer.name]}
        found |= _rates(optimizer)
    if optimizer.name == "lars":
        found["optim.form"] = optimizer.form
    return {**found, **_frozen(optimizer.tensors, shapes)}


def own_sections(shapes: Shapes) -> dict[str, object]:
    """As ``sections``, of a state under canonical names, which holds no hyper-parameters.

    SGD and LARS have the same moments. MoCo v3 trains a ResNet by LARS.

    Args:
        shapes: of all tensors, by canonical name.
    """
    entries = [name for name in shapes if name.startswith("optimizer.") and name not in COUNTS]
    kinds = {name.split(".")[1] for name in entries}
    names = [name for name, own in KINDS.items() if kinds == set(own)]
    if not names:
        return {}
    lars = "student.predictor.0.weight" in shapes and CLASS not in shapes
    name = "lars" if lars and "lars" in names else names[0]
    return {"optim.name": name, **_frozen(entries, shapes)}


def _frozen(entries: Iterable[str], shapes: Shapes) -> dict[str, object]:
    """Whether tensors that may be frozen are, by the moments that there are."""
    trained = {name.split(".", 2)[2] for name in entries if name not in COUNTS}
    frozen = {key: name not in trained for key, name in FREEZABLE.items() if name in shapes}
    return dict(frozen) if trained else {}


def _rates(optimizer: Optimizer) -> dict[str, object]:
    """Learning rate, and weight decay with the tensors that have it."""
    decays = {name: _decay(group) for group in optimizer.options for name in group.params}
    found: dict[str, object] = {"optim.weight_decay": max(decays.values(), default=0.0)}
    lr: Node = optimizer.options[0].values.get("lr")
    if isinstance(lr, int | float) and lr > 0:
        found |= {"optim.lr": lr, "optim.scale_lr_by": None, "optim.schedule": "constant"}
    if optimizer.name == "adamw" and 0.0 in decays.values() and any(decays.values()):
        found["optim.decay_on"] = "matrices" if decays.get(CLASS) else "weights"
    return found


def _decay(group: Options) -> float:
    decay: Node = group.values.get("weight_decay", 0.0)
    if not isinstance(decay, int | float) or not math.isfinite(decay):
        text = printable(repr(decay))[:40]
        raise UserError(f"the optimizer has weight_decay {text}, expected a number; give -c SPEC")
    return float(decay)


def training_state(optimizer: Optimizer, spec: RunSpec, say: Say) -> State:
    """The entries of an optimizer for a run: those of the file, and zeros for what it lacks.

    Args:
        optimizer: of the file.
        spec: of the run.
        say: called with a line for each thing that starts anew or is left out.

    Raises:
        UserError: the run has another kind of optimizer, or the file has moments of tensors that
            the run does not train.
    """
    if spec.optim.name != optimizer.name:
        raise UserError(
            f"optim.name: {spec.optim.name}: the file holds the state of {optimizer.name}; set "
            "optim.name, or save its state dict alone to begin with a fresh optimizer"
        )
    optimizer = _in_form(optimizer, spec)
    params = {param.name: param for param in table(spec) if param.trainable}
    state: State = {}
    for kind in KINDS[optimizer.name]:
        prefix = f"optimizer.{kind}."
        for name, param in params.items():
            stored = optimizer.tensors.get(prefix + name)
            state[prefix + name] = (
                np.zeros(param.shape, np.float32) if stored is None else np.array(stored.array())
            )
    if surplus := [n for n in optimizer.tensors if n not in COUNTS and n not in state]:
        raise UserError(
            f"{surplus[0]}: the run does not train this tensor ({len(surplus)} such entries); see "
            "model.freeze_patch_embed and model.freeze_positions"
        )
    for note in optimizer.notes:
        say(f"left out: {note}")
    for line in _anew(optimizer, params):
        say(line)
    counts = {name: optimizer.tensors[name] for name in COUNTS if name in optimizer.tensors}
    state[STEP] = np.zeros((), np.int64)
    return {**state, **{name: tensor.array().astype(np.int64) for name, tensor in counts.items()}}


def _in_form(optimizer: Optimizer, spec: RunSpec) -> Optimizer:
    """The state with the momentum of LARS in the form of the run."""
    if not isinstance(spec.optim, LarsSpec):
        return optimizer
    lr = optimizer.options[0].values.get("lr") if optimizer.options else None
    try:
        tensors = {
            name: tensor if name in COUNTS else in_form(tensor, optimizer.form, spec.optim.form, lr)
            for name, tensor in optimizer.tensors.items()
        }
    except Malformed as error:
        raise UserError(f"optim.form: {spec.optim.form}: {error}") from error
    return replace(optimizer, tensors=tensors)


def _anew(optimizer: Optimizer, params: Mapping[str, object]) -> Iterator[str]:
    """A line for each entry, or kind of entries, that the file lacks."""
    if not optimizer.tensors:
        yield "optimizer: starts anew at 0: the file holds neither moments nor a number of updates"
        return
    for kind in KINDS[optimizer.name]:
        prefix = f"optimizer.{kind}."
        lost = [name for name in params if prefix + name not in optimizer.tensors]
        whole = len(lost) == len(params)
        if whole or len(lost) > SHOWN:
            first = f"optimizer.{kind}" if whole else f"{prefix}{lost[0]} and {len(lost) - 1} more"
            yield f"{first}: starts anew at 0: the file holds none"
        else:
            yield from (f"{prefix}{n}: starts anew at 0: the file holds none" for n in lost)
    if STEP not in optimizer.tensors:
        why = "" if optimizer.name == "adamw" else f"; {optimizer.name} does not need it"
        yield f"{STEP}: starts anew at 0: the file holds none{why}"
