"""The proof of a refactoring: every number of every golden case and digits recipe, as digests.

    python tests/support/traces.py record DIR [--backends torch,paddle] [--keep]
    diff -r DIR_BEFORE DIR_AFTER

``record`` runs ``tools/parity.py trace`` in float64 for each golden case (official weights, images
and draws) and each digits recipe (the spec's own), and writes ``DIR/<case>-<backend>.txt``: name,
dtype, shape and SHA-256 of each array of the record. Equal files mean bit-identical numbers. The
record's copy of the spec is left out, so that a new key of the spec is no difference. ``--keep``
keeps the records themselves, for ``tools/parity.py compare`` where a difference is intended.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support.golden_replay import CASES, draws_of, hyper_of, spec_file
from support.golden_weights import description, official_state, views

from triptych import backends

RECIPES = (
    *("moco_v1/digits", "moco_v2/digits", "moco_v3/digits", "moco_v3/digits_resnet"),
    "moca/digits",
)
STEPS = 3


def main() -> int:
    """Records all cases on all backends; the exit status is that of the first failing trace."""
    parser = argparse.ArgumentParser(prog="traces", description=__doc__.partition("\n")[0])
    parser.add_argument("command", choices=("record",))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--backends", default=",".join(backends.installed()))
    parser.add_argument("--cases", default=",".join((*CASES, *RECIPES)))
    parser.add_argument("--keep", action="store_true", help="keep the records, which are large")
    found = parser.parse_args()
    found.folder.mkdir(parents=True, exist_ok=True)
    for case in found.cases.split(","):
        options = _golden(case, found.folder) if case in CASES else ["-c", case, "--steps", "3"]
        for backend in found.backends.split(","):
            output = found.folder / f"{case.replace('/', '-')}-{backend}.npz"
            command = [sys.executable, "-m", "triptych.core.cli", "parity", "trace", *options]
            command += ["--backend", backend, "--dtype", "float64", "-o", str(output)]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            done = subprocess.run([*command, "-o", "threads=1"], env=environment)
            if done.returncode:
                return done.returncode
            output.with_suffix(".txt").write_text(_digests(output))
            if not found.keep:
                output.unlink()
    return 0


def _golden(case: str, folder: Path) -> list[str]:
    """Writes a golden case's weights, images, draws and hyper-parameters; gives the options."""
    steps = min(STEPS, description(case)["config"]["steps"])
    weights, inputs, hyper = (folder / f".{case}.{kind}" for kind in ("w.npz", "i.npz", "json"))
    np.savez(weights, **official_state(case))
    one, two = zip(*(views(case, step) for step in range(steps)), strict=True)
    draws = [draws_of(case, step) for step in range(steps)]
    stacked = {name: np.stack([drawn[name] for drawn in draws]) for name in draws[0]}
    np.savez(inputs, view1=np.stack(one), view2=np.stack(two), **stacked)
    fixed = hyper_of(case)
    values = {"lr": fixed.lr, "weight_decay": fixed.weight_decay, "ema": fixed.ema}
    hyper.write_text(json.dumps(values))
    options = ["-c", str(spec_file(case)), "--steps", str(steps), "--weights", str(weights)]
    return [*options, "--inputs", str(inputs), "--hyper", str(hyper)]


def _digests(path: Path) -> str:
    """One line for each array of a record, in the order of the computation."""
    lines = []
    with np.load(path) as record:
        for name in record.files:
            if name == "spec":
                continue
            array = np.ascontiguousarray(record[name])
            digest = hashlib.sha256(array.tobytes()).hexdigest()
            lines.append(f"{name} {array.dtype} {array.shape} {digest}\n")
    return "".join(lines)


if __name__ == "__main__":
    sys.exit(main())
