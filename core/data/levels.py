"""A look at a few images before a run: do their 16 bits leave any levels in 8?"""

from contextlib import suppress

import numpy as np

from triptych.core.data.bits import USED
from triptych.core.data.decode import DamagedImage
from triptych.core.data.jobs import memory_for
from triptych.core.data.source import Source
from triptych.core.errors import printable

LOOK = 8
"""Images that are looked at, spread over the source."""
UNUSED = 2
"""Unused bits from which on it is told: a quarter of 256 levels is left, or less."""


def few_levels(source: Source) -> str | None:
    """What to tell of 16-bit images that use the lowest bits alone; None if there are none.

    Images that cannot be read are passed over: the run that reads them names them.
    """
    dark: dict[str, tuple[int, int]] = {}
    looked = np.unique(np.linspace(0, len(source) - 1, min(LOOK, len(source))).astype(int))
    for index in map(int, looked):
        with suppress(DamagedImage), memory_for(source, index):
            image = source.image(index)
            used, kept = image.info.get(USED, (0, 0))
            if 0 < used <= kept - UNUSED:
                dark[source.name(index)] = used, kept
    if not dark:
        return None
    used, kept = max(used for used, _ in dark.values()), max(kept for _, kept in dark.values())
    others = f" and {len(dark) - 1} more" if len(dark) > 1 else ""
    return (
        f"{printable(next(iter(dark)))}{others} of {len(looked)} images looked at: 16-bit samples "
        f"that use {used} bits of {kept} keep at most {max(1, 256 >> (kept - used))} of 256 "
        f"levels; data.bits={max(used, 8)} keeps them all"
    )
