"""Looks at a few images before a run: how many levels do their 16 bits keep in 8?"""

from contextlib import suppress

import numpy as np

from triptych.core.data.bits import USED
from triptych.core.data.decode import DamagedImage
from triptych.core.data.jobs import memory_for
from triptych.core.data.source import Source
from triptych.core.errors import printable

LOOK = 8
"""Number of images to look at, spread over the source."""
UNUSED = 2
"""Least number of unused bits to warn about; a quarter of the 256 levels is left then."""


def few_levels(source: Source) -> str | None:
    """A warning about 16-bit images that use only the lowest bits; None if there are none.

    Damaged images are ignored here: the run names them when it reads them.
    """
    dark: dict[str, tuple[int, int]] = {}
    looked = np.unique(np.linspace(0, len(source) - 1, min(LOOK, len(source))).astype(int))
    for index in map(int, looked):
        with suppress(DamagedImage), memory_for(source, index):
            image = source.image(index)
            used, bits = image.info.get(USED, (0, 0))
            if 0 < used <= bits - UNUSED:
                dark[source.name(index)] = used, bits
    if not dark:
        return None
    used, bits = max(used for used, _ in dark.values()), max(bits for _, bits in dark.values())
    others = f" and {len(dark) - 1} more" if len(dark) > 1 else ""
    return (
        f"{printable(next(iter(dark)))}{others} of {len(looked)} images looked at: 16-bit samples "
        f"that use {used} bits of {bits} keep at most {max(1, 256 >> (bits - used))} of 256 "
        f"levels; data.bits={max(used, 8)} keeps them all"
    )
