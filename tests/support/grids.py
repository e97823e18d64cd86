"""Specs for several processes, and grids of four of them."""

from support.divided import METHODS, MODEL, SPECS, spec_of
from support.native import tiny_spec

from triptych.core.config.spec import ParallelSpec, RunSpec


def divided(spec: RunSpec, **degrees) -> RunSpec:
    """The spec for several processes, checked anew."""
    return RunSpec.model_validate({**spec.model_dump(mode="json"), "parallel": degrees})


def alone(spec: RunSpec) -> RunSpec:
    return spec.model_copy(update={"parallel": ParallelSpec()})


DATA = {
    **SPECS,
    "moco_v3 of a ResNet": tiny_spec(case="moco_v3_resnet18"),
    "moco_v2": tiny_spec(case="moco_v2_bottleneck", batch_norm={"virtual_ranks": 2}),
    "moco_v1 of shared statistics": tiny_spec(
        case="moco_v1_resnet18", batch_norm={"virtual_ranks": 1, "running_variance": "biased"}
    ),
}
DEEP = {
    "moco_v3": tiny_spec(model={"depth": 4}, optim={"name": "lars", "weight_decay": 0.01}),
    "moca": tiny_spec(case="moca_vit", model={"depth": 4}, method={"decoder_heads": 4}),
    "finetune": spec_of(METHODS["finetune"], {**MODEL, "depth": 4, "heads": 4}),
}
GRIDS: list[dict[str, int]] = [
    {"data": 4},
    {"tensor": 4},
    {"pipeline": 4, "micro_batches": 4},
    {"data": 2, "tensor": 2},
    {"data": 2, "pipeline": 2, "micro_batches": 2},
    {"tensor": 2, "pipeline": 2, "micro_batches": 2},
    {"data": 2, "pipeline": 2, "shard_optimizer": True, "recompute": True},
]
FOUR = {
    f"{method}, {grid}": divided(spec, **grid) for method, spec in DEEP.items() for grid in GRIDS
}
RESNETS = {
    name: divided(DATA[name], data=4)
    for name in ("moco_v1", "moco_v1 of virtual ranks", "moco_v2", "moco_v3 of a ResNet", "linear")
}
