"""The demonstration: one recipe on every backend, then the curves side by side in runs/demo.

``python -m triptych.core.demo [BACKEND ...]``; ``make demo`` calls it after the set-up.
"""

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from triptych.core import cli, comparison
from triptych.core.errors import UserError

RECIPE = "moco_v3/digits"
OUTPUT = Path("runs") / "demo"


def run(names: Sequence[str], output: Path = OUTPUT) -> int:
    """Trains the recipe on each backend and compares; what an earlier demo wrote is replaced.

    Args:
        names: backends; "none" is none of them; empty: all that are installed.

    Returns:
        The exit status.

    Raises:
        UserError: as ``comparison.run``, or ``output`` holds something that is no run.
    """
    chosen = comparison.choose([name for name in names if name != "none"] if names else None)
    for name in chosen:
        clear(output / name)
    return comparison.run(RECIPE, [], chosen, output)


def clear(run_dir: Path) -> None:
    """Removes the run of an earlier demo.

    Raises:
        UserError: the folder is not one that a run has written.
    """
    if not run_dir.exists():
        return
    empty = run_dir.is_dir() and not any(run_dir.iterdir())
    if not empty and (run_dir.is_symlink() or not (run_dir / "spec.yaml").is_file()):
        raise UserError(f"{run_dir}: is not the run of an earlier demo; move it away")
    shutil.rmtree(run_dir)


if __name__ == "__main__":
    sys.exit(cli.exit_status(lambda: run(sys.argv[1:])))
