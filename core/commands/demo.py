"""``demo``: trains one recipe on every backend and compares the curves in runs/demo."""

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

from triptych.core.config.recipes import recipes
from triptych.core.errors import UserError
from triptych.core.launch import refuse_launchers
from triptych.core.training import everywhere

RECIPE = "moco_v3/digits"
OUTPUT = Path("runs") / "demo"
LONG = "digits_long"
"""Names of the digits' recipes that take longer than minutes end so."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--all", action="store_true", help="every short recipe of the digits")
    parser.add_argument(
        "names", nargs="*", metavar="BACKEND", help="backends, or none; default: all installed"
    )


def run(arguments: argparse.Namespace) -> None:
    """Trains one recipe, or all of them.

    Raises:
        UserError: as in ``demonstrate``.
    """
    refuse_launchers()  # before earlier runs are removed
    if not arguments.all:
        demonstrate(arguments.names)
    for recipe in short_recipes() if arguments.all else ():
        print(f"\n{recipe}", flush=True)
        output = OUTPUT.with_name("demo-all") / recipe.replace("/", "-")
        demonstrate(arguments.names, output, recipe)


def short_recipes() -> list[str]:
    """Names of the recipes of the digits that take minutes."""
    return [name for name in recipes() if "/digits" in name and not name.endswith(LONG)]


def demonstrate(names: Sequence[str], output: Path = OUTPUT, recipe: str = RECIPE) -> None:
    """Trains the recipe on each backend and compares the runs. Earlier demo runs are replaced.

    Args:
        names: backends; "none" stands for no backend; empty: all installed backends.

    Raises:
        UserError: as in ``everywhere.run``, or ``output`` holds something that is no run.
    """
    backends = everywhere.choose([name for name in names if name != "none"] if names else None)
    for name in backends:
        clear(output / name)
    everywhere.run(recipe, [], backends, output)


def clear(run_dir: Path) -> None:
    """Removes the run of an earlier demo.

    Raises:
        UserError: the folder was not written by a run.
    """
    if not run_dir.exists():
        return
    empty = run_dir.is_dir() and not any(run_dir.iterdir())
    if not empty and (run_dir.is_symlink() or not (run_dir / "spec.yaml").is_file()):
        raise UserError(f"{run_dir}: is not the run of an earlier demo; move it away")
    shutil.rmtree(run_dir)
