"""Which stage of a pipeline has which tensors.

The first stage embeds the patches, and each stage has contiguous blocks. The last stage also has
the norm after the blocks, all heads and further networks, and the memory. Student and teacher are
divided alike.
"""

import itertools
import re

from triptych.core import parameters
from triptych.core.config.spec import RunSpec, VitSpec

EMBEDDING = ("cls_token", "pos_embed", "patch_embed")
BLOCK = re.compile(r"(student|teacher)\.encoder\.blocks\.(\d+)\.")


def blocks_of(depth: int, stages: int) -> list[range]:
    """The indices of the blocks of each stage.

    If the blocks do not divide evenly, the first stages have one more: the last one has the heads.

    Args:
        depth: number of blocks.
        stages: number of stages, at most ``depth``.
    """
    size, larger = divmod(depth, stages)
    starts = [stage * size + min(stage, larger) for stage in range(stages + 1)]
    return [range(*pair) for pair in itertools.pairwise(starts)]


def stages(spec: RunSpec) -> dict[str, int]:
    """The stage, from 0, of each tensor of ``core.parameters.table(spec)``, by canonical name."""
    last = spec.parallel.pipeline - 1
    if not isinstance(spec.model, VitSpec):
        return {param.name: last for param in parameters.table(spec)}
    places = blocks_of(spec.model.depth, spec.parallel.pipeline)
    of_block = {block: stage for stage, blocks in enumerate(places) for block in blocks}
    return {param.name: _stage(param.name, of_block, last) for param in parameters.table(spec)}


def _stage(name: str, of_block: dict[int, int], last: int) -> int:
    match = BLOCK.match(name)
    if match:
        return of_block[int(match[2])]
    _, part, *rest = name.split(".")
    return 0 if part == "encoder" and rest[0] in EMBEDDING else last
