"""Finds spec files by a path or by the name of a shipped recipe."""

import difflib
import os
from pathlib import Path

from triptych.core.errors import UserError

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
"""Folder of the shipped recipes, in a checkout and in an installed package."""


ALIASES = {
    "mocov1_pt_in1k_1n8c": "moco_v1/resnet50_paddle",
    "mocov2_pt_in1k_1n8c": "moco_v2/resnet50_paddle",
    "mocov2_resnet50_8xb32-coslr-200e_in1k": "moco_v2/resnet50",
    "resnet50_mocov2-pre_8xb32-linear-steplr-100e_in1k": "moco_v2/resnet50_linear",
    "mocov3_resnet50_8xb512-amp-coslr-100e_in1k": "moco_v3/resnet50_100ep",
    "mocov3_resnet50_8xb512-amp-coslr-300e_in1k": "moco_v3/resnet50_300ep",
    "mocov3_resnet50_8xb512-amp-coslr-800e_in1k": "moco_v3/resnet50_800ep",
    "mocov3_vit-small-p16_16xb256-amp-coslr-300e_in1k": "moco_v3/vit_small",
    "mocov3_vit-base-p16_16xb256-amp-coslr-300e_in1k": "moco_v3/vit_base",
    "mocov3_vit-large-p16_64xb64-amp-coslr-300e_in1k": "moco_v3/vit_large",
    "resnet50_mocov3-100e-pre_8xb128-linear-coslr-90e_in1k": "moco_v3/resnet50_100ep_linear",
    "resnet50_mocov3-300e-pre_8xb128-linear-coslr-90e_in1k": "moco_v3/resnet50_300ep_linear",
    "resnet50_mocov3-800e-pre_8xb128-linear-coslr-90e_in1k": "moco_v3/resnet50_800ep_linear",
    "vit-small-p16_mocov3-pre_8xb128-linear-coslr-90e_in1k": "moco_v3/vit_small_linear",
    "vit-base-p16_mocov3-pre_8xb128-linear-coslr-90e_in1k": "moco_v3/vit_base_linear",
    "vit-base-p16_mocov3-pre_8xb64-coslr-150e_in1k": "moco_v3/vit_base_finetune_mmpretrain",
    "vit-large-p16_mocov3-pre_8xb64-coslr-100e_in1k": "moco_v3/vit_large_finetune_mmpretrain",
}
"""Maps names of runs in mmpretrain and PaddleFleetX to recipes."""


def recipes() -> dict[str, Path]:
    """The file of each recipe by name, like ``moco_v3/vit_small``, sorted, without shared parts."""
    files = {
        path.relative_to(CONFIGS).with_suffix("").as_posix(): path
        for path in sorted(CONFIGS.rglob("*.yaml"))
    }
    return {name: path for name, path in files.items() if not name.startswith("_base_/")}


def find(name_or_path: str | Path, folder: str | Path = "") -> Path:
    """The file of a path relative to ``folder``, or else of a recipe's name or alias.

    Raises:
        UserError: there is no such file and no such recipe. The message suggests a similar name.
    """
    path = Path(os.path.normpath(Path(folder) / os.path.expanduser(name_or_path)))
    known = recipes()
    known.update({alias: known[name] for alias, name in ALIASES.items()})
    if os.path.exists(path) and not (os.path.isdir(path) and str(name_or_path) in known):
        return path
    if str(name_or_path) in known:
        return _from_here(known[str(name_or_path)])
    if os.path.islink(path):
        raise UserError(f"{path}: no such file: the link leads nowhere")
    beside = [str(p) for p in path.parent.glob("*.yaml")] if os.path.isdir(path.parent) else []
    near = difflib.get_close_matches(str(path), beside, 1) or difflib.get_close_matches(
        str(name_or_path), known, 1
    )
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    raise UserError(f"{path}: no such file, and no recipe has this name{hint}")


def _from_here(path: Path) -> Path:
    """The path relative to the working directory, if it is inside: shorter in messages."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
