"""Two steps from every checkpoint below a folder, beside those of the system itself.

    PYTHONPATH=tests python tests/support/resume_all.py FOLDER [BACKEND ...]

A checkpoint counts if ``<name>.resume.json``, ``.resume.npz`` and ``.golden.json`` lie beside it. A
line shows the largest relative error of each kind; the exit status is 1 if one is above its limit.
"""

import json
import sys
import tempfile
from pathlib import Path

from support.resuming import BINARY, LIMITS, ROUNDED, Error, Resumed, worst

from triptych.core.machine.environment import possible

ENDING = ".resume.json"
HEADS = {
    "heads": "model.heads",
    "num_heads": "model.heads",
    "decoder_num_heads": "method.decoder_heads",
}
"""Keys of the spec that no file shows, by names in a description."""


def compare(path: Path, backend: str, *, binary: bool) -> dict[str, Error]:
    """The largest errors of a file's run on a backend, by kind."""
    told = json.loads(Path(f"{path}.golden.json").read_text())["architecture"]
    shown = {ours: told[theirs] for theirs, ours in HEADS.items() if theirs in told}
    resumed = Resumed(path, binary=binary)
    with tempfile.TemporaryDirectory() as folder:
        record = resumed.replay(backend, Path(folder), [f"{k}={v}" for k, v in shown.items()])
    facts = {key: value for key, value in shown.items() if key.startswith("model.")}
    return worst(resumed.errors(record, facts))


def main() -> int:
    """Prints a line for each file, run and backend."""
    folder, *backends = sys.argv[1:]
    wrong = 0
    for told in sorted(Path(folder).rglob(f"*{ENDING}")):
        path = told.with_name(told.name.removesuffix(ENDING))
        rounds = "hyper_binary" in json.loads(told.read_text())
        for backend in backends or possible():
            for binary in (False, True) if rounds else (False,):
                limits = BINARY if binary else ROUNDED if rounds else LIMITS
                errors = compare(path, backend, binary=binary)
                bad = [kind for kind, e in errors.items() if not e.value <= limits[kind]]
                wrong += bool(bad)
                run = "binary fractions" if binary else "main run"
                shown = ", ".join(f"{kind} {e.value:.1e}" for kind, e in errors.items())
                print(f"{'BAD' if bad else 'ok '} {path.relative_to(folder)} {backend} {run}: "
                      f"{shown}", flush=True)  # fmt: skip
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
