"""Small runs of every method in float64, to be divided, and what the division has changed."""

from collections.abc import Mapping

import numpy as np
from support.native import TINY, tiny_spec

from triptych.core.config.spec import RunSpec
from triptych.core.contracts import Array

MODEL = {
    "name": "vit",
    "width": 16,
    "depth": 3,
    "heads": 2,
    "patch_size": 4,
    "image_size": [8, 12],
    "freeze_patch_embed": False,
}
METHODS = {
    "linear": {"name": "linear", "classes": 5, "rates": [1.0, 0.5]},
    "finetune": {
        "name": "finetune",
        "classes": 5,
        "drop_path": 0.3,
        "mixing": {"mixup": 0.8, "cutmix": 1.0, "smoothing": 0.1},
    },
    "moco_v1": TINY["moco_v1_resnet18"]["method"],
}


def spec_of(method, model=MODEL, batch=8, parts=1, **sections) -> RunSpec:
    """A run in float64 whose steps have ``parts`` micro-batches."""
    given = {
        "precision": "float64",
        "threads": 1,
        "model": model,
        "method": method,
        "train": {"steps": 5, "batch_size": batch, "accumulate": parts},
        **sections,
    }
    return RunSpec.model_validate(given)


def in_parts(spec, parts):
    return spec.model_copy(update={"train": spec.train.model_copy(update={"accumulate": parts})})


SPECS = {
    "linear": spec_of(METHODS["linear"]),
    "finetune": spec_of(METHODS["finetune"]),
    "finetune of virtual ranks": spec_of(
        {"name": "finetune", "classes": 5},
        TINY["moco_v1_resnet18"]["model"],
        batch_norm={"virtual_ranks": 2},
    ),
    "moco_v1": spec_of(METHODS["moco_v1"]),
    "moco_v1 of virtual ranks": tiny_spec(case="moco_v1_resnet18"),
    "moco_v3": tiny_spec(),
    "moco_v3 of virtual ranks": tiny_spec(case="moco_v3_resnet18", batch_norm={"virtual_ranks": 2}),
    "moco_v3 whose teacher copies statistics": tiny_spec(method={"teacher_statistics": "copied"}),
    "moca": tiny_spec(case="moca_vit"),
}


def differences(got: Mapping[str, Array], wanted: Mapping[str, Array]) -> list[str]:
    """Names of arrays that differ by more than 1e-8 of their largest value."""
    assert got.keys() == wanted.keys()
    found = []
    for name, array in wanted.items():
        pair = [got[name], array]
        if "qkv.bias" in name:  # the keys' third has no true gradient
            pair = [np.delete(np.reshape(x, (3, -1)), 1, 0) for x in pair]
        # Batch norm in MoCo v3's heads takes the true gradient of the last layer norm's bias.
        least = 1e-4 if "encoder.norm.bias" in name else 0.0
        if np.abs(pair[0] - pair[1]).max() > 1e-8 * max(np.abs(pair[1]).max(), least):
            found.append(name)
    return found
