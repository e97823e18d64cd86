"""Two training steps from a checkpoint of a foreign system, beside that system's own two.

Beside a checkpoint lie ``<name>.resume.json`` and ``<name>.resume.npz`` with losses, gradients,
states and moments of the system itself. Norms and probes stand for whole tensors, in the layout of
the file (see golden/formats/README.md).
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from support.golden_weights import probe

from triptych.core.config.spec import RunSpec
from triptych.core.contracts import State
from triptych.core.files.saving import write
from triptych.core.files.tree import Stored
from triptych.core.formats.changes import Facts
from triptych.core.formats.format import Format, Output, facts_of
from triptych.core.formats.loading import read_weights
from triptych.core.formats.opening import read_spec
from triptych.core.parity.trace import run_trace

STEPS = 2
LIMITS = {"loss": 1e-9, "feature": 1e-7, "grad": 1e-7, "state": 1e-7, "moment": 1e-7}
"""Largest relative errors in float64 for systems on PyTorch."""
ROUNDED = {"loss": 1e-6, "feature": 1e-4, "grad": 1e-4, "state": 1e-5, "moment": 1e-4}
"""Those of systems whose kernels take some numbers as float32 (Paddle, OneFlow)."""
BINARY = {"loss": 1e-8, "feature": 1e-6, "grad": 1e-6, "state": 1e-5, "moment": 1e-6}
"""Those of the same systems with numbers that float32 holds exactly."""
NOISE = 1e-9
"""A gradient with a smaller share of the norm of all gradients is zero in theory."""
KINDS = {"mu": "momentum_buffer", "velocity": "momentum_buffer"}
"""Canonical kind of moment, where it differs."""
DRAWS = ("shuffle_perm", "mask_ids_round1", "mask_ids_round2", "codebook_coin",
         "codebook_image_perm", "codebook_token_pick")  # fmt: skip
FEATURES = ("q1", "q2", "k1", "k2", "q_raw", "x_cls_round1", "x_cls_round2")
OPTIONS = {
    "temperature": "method.temperature",
    "betas": "optim.betas",
    "eps": "optim.eps",
    "momentum": "optim.momentum",
    "trust_coefficient": "optim.trust_coefficient",
    "clip_grad": "optim.clip_norm",
    "lr_wgen": "optim.generator_lr",
    "weight_decay_wgen": "optim.weight_decay",
}
"""Keys of the spec, by names of hyper-parameters. Rates come from a file of their own."""


class Error(NamedTuple):
    """How far a number is from that of the foreign system.

    Attributes:
        kind: as in ``LIMITS``.
        name: of the tensor in the file.
        step: of the number.
        value: relative error.
    """

    kind: str
    name: str
    step: int
    value: float


class Resumed:
    """A checkpoint, and the two steps that its own system took from it.

    Args:
        path: of the checkpoint.
        binary: whether to take the second run, whose numbers float32 holds exactly.
        checkpoint: where the checkpoint is, if not at ``path``.
    """

    def __init__(self, path: Path, *, binary: bool = False, checkpoint: Path | None = None) -> None:
        self.path = checkpoint or path
        self.told = json.loads(Path(f"{path}.resume.json").read_text())
        with np.load(f"{path}.resume.npz") as arrays:
            self.arrays = dict(arrays)
        self.prefix = "binary/" if binary else ""
        self.hyper: dict[str, Any] = self.told["hyper_binary" if binary else "hyper"]

    def replay(
        self,
        backend: str,
        folder: Path,
        overrides: Sequence[str] = (),
        precision: str = "float64",
        weights: Path | None = None,
    ) -> dict[str, np.ndarray]:
        """The record of the same two steps here.

        Args:
            backend: name of the backend.
            folder: for files of images and rates.
            overrides: what the file does not say about the model.
            precision: of the run.
            weights: another file with the same state.
        """
        inputs, hyper = folder / "inputs.npz", folder / "hyper.json"
        np.savez(inputs, **self._inputs(), **self._draws())
        names = {"lr": "lr", "weight_decay": "weight_decay", "ema": "ema_momentum"}
        hyper.write_text(json.dumps({ours: self.hyper[name] for ours, name in names.items()}))
        weights = weights or self.path
        spec = read_spec(weights, [*self._overrides(precision), *overrides])
        self.said: list[str] = []
        record = run_trace(spec, backend, STEPS, weights=weights, inputs=inputs, hyper=hyper,
                           say=self.said.append)  # fmt: skip
        return dict(record)

    def _overrides(self, precision: str) -> Iterator[str]:
        yield from (f"precision={precision}", "threads=2", f"train.batch_size={self.told['N']}")
        yield f"model.image_size={self.told['image_size']}"
        for theirs, ours in OPTIONS.items():
            # The epsilon of LARS is a constant of its form.
            if theirs in self.hyper and not (theirs == "eps" and "betas" not in self.hyper):
                yield f"{ours}={json.dumps(self.hyper[theirs])}"

    def _inputs(self) -> dict[str, np.ndarray]:
        count, size = self.told["N"], self.told["image_size"]
        views: dict[str, list[np.ndarray]] = {"view1": [], "view2": []}
        for step in range(STEPS):
            for view in (1, 2):
                rng = np.random.Generator(np.random.Philox(key=9100 + 10 * step + view))
                images = np.float32(rng.standard_normal((count, 3, size, size)))
                assert np.isclose(images.sum(dtype=np.float64),
                                  self.told["image_sum"][step][view - 1])  # fmt: skip
                views[f"view{view}"].append(images.astype(np.float64))
        return {name: np.stack(images) for name, images in views.items()}

    def _draws(self) -> dict[str, np.ndarray]:
        found = {
            name: [self.arrays.get(f"{name}/step{step}") for step in range(STEPS)] for name in DRAWS
        }
        return {name: np.stack(values) for name, values in found.items() if values[0] is not None}

    # ------------------------------------------------------------------------------ comparison

    def errors(self, got: dict[str, np.ndarray], facts: Facts) -> list[Error]:
        """The relative errors of a float64 record.

        Args:
            got: the record of ``replay``.
            facts: what the file does not say about the model.
        """
        _, source = read_weights(self.path, None, facts=facts)
        self.layout, self.facts = source.layout, source.facts
        self.ours = {t: name for name, parts in source.renamed.origin.items() for t in parts}
        self.left: set[str] = set()
        noise = self._noise()
        return [
            *self._losses(got),
            *self._columns("grad", "grad", self.told["trainable_names"], got, STEPS, noise),
            *self._states(got, noise),
            *self._moments(got, noise),
        ]

    def _losses(self, got: dict[str, np.ndarray]) -> Iterator[Error]:
        for step, loss in enumerate(self.arrays[f"{self.prefix}loss"]):
            yield Error("loss", "loss", step, abs(got["loss"][step] - loss) / abs(loss))
            for name in FEATURES if not self.prefix else ():
                want = self.arrays.get(f"{name}/step{step}")
                if want is not None:
                    gap = np.abs(got[f"feature/{name}/step{step}"] - want).max()
                    yield Error("feature", name, step, gap / np.abs(want).max())

    def _noise(self) -> set[str]:
        """Canonical names of the parameters whose gradient is zero in theory."""
        norms = self.arrays[f"{self.prefix}grad_norm"]
        total = np.linalg.norm(norms, axis=1, keepdims=True)
        small = (norms <= NOISE * total).any(axis=0)
        names = self.told["trainable_names"]
        return {self._own(name) for name, is_small in zip(names, small, strict=True) if is_small}

    def _own(self, name: str) -> str:
        """The canonical name of a tensor; "" if it has none."""
        return self.ours.get(name.removeprefix("module."), "")

    def _states(self, got: dict[str, np.ndarray], noise: set[str]) -> Iterator[Error]:
        names = [entry["name"] for entry in self.told["state"]]
        yield from self._columns("state", "state", names, got, STEPS + 1, noise)

    def _moments(self, got: dict[str, np.ndarray], noise: set[str]) -> Iterator[Error]:
        for kind, names in self.told["moments"].items():
            prefix = f"state/optimizer.{KINDS.get(kind, kind)}."
            yield from self._columns("moment", f"moment_{{}}/{kind}", names, got, STEPS + 1, noise,
                                     prefix)  # fmt: skip

    def _columns(self, kind: str, array: str, names: Sequence[str], got: dict[str, np.ndarray],
                 rows: int, noise: set[str], prefix: str = "") -> Iterator[Error]:  # fmt: skip
        """The errors of norms and probes of one kind."""
        key = array if "{}" in array else array + "_{}"
        norms, probes = (self.arrays[self.prefix + key.format(k)] for k in ("norm", "probe"))
        for i, name in enumerate(names):
            ours = self._own(name)
            if not ours:
                self.left.add(name)
                continue
            if ours.replace("teacher.", "student.", 1) in noise:
                continue
            for row in range(rows):
                own = self._file_tensor(name, ours, got[f"{prefix or kind + '/'}{ours}/step{row}"])
                size = norms[row, i]
                gap = max(abs(np.linalg.norm(own) - size), abs(probe(own) - probes[row, i]))
                yield Error(kind, name, row, gap / max(size, 1e-12))

    def _file_tensor(self, name: str, ours: str, array: np.ndarray) -> np.ndarray:
        """A canonical array in the layout of the file."""
        found = self.layout.table.theirs(ours)
        parts = found[1].from_canonical(Stored.of(array), self.facts)
        return parts[found[0].index(name.removeprefix("module."))].array().astype(np.float64)


def worst(errors: Sequence[Error]) -> dict[str, Error]:
    """The largest error of each kind."""
    found: dict[str, Error] = {}
    for error in errors:
        if error.kind not in found or not error.value <= found[error.kind].value:
            found[error.kind] = error
    return found


def written(target: Format, state: State, spec: RunSpec, path: Path) -> None:
    """Writes a training state as a file of a system."""
    layout = target.layout(spec)
    tensors, _ = layout.table.from_canonical(
        {name: Stored.of(array) for name, array in state.items()}, facts_of(spec)
    )
    optimizer = {n: Stored.of(a) for n, a in state.items() if n.startswith("optimizer.")}
    container, tree = target.output(Output(layout, layout.ordered(tensors), optimizer, spec))
    write(path, tree, container)
