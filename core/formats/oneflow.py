"""Our own names in a folder of OneFlow, and flowvision's residual networks.

flowvision has torchvision's names, and OneFlow PyTorch's layouts.
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from triptych.core.files.tree import Content, Node, Stored
from triptych.core.formats.arithmetic import Resnet
from triptych.core.formats.canonical import ARITHMETIC, STATE
from triptych.core.formats.format import Format, Output, Place, places
from triptych.core.formats.single import RESNET_CLASSIFIER, RESNET_ENCODER

CONTAINERS = ("oneflow",)


def own_places(content: Content) -> Iterator[Place]:
    """The state dicts of a folder, which may hold several folders of ``oneflow.save``.

    Equal weights in two of them count once, where the optimizer is.
    """
    if content.container not in CONTAINERS:
        return
    plain, trained = [*places(content)], []
    for name, part in content.tree.items() if isinstance(content.tree, dict) else ():
        if isinstance(part, dict) and "optimizer" in part:
            inner = places(replace(content, tree=part))
            trained += [spot._replace(name=f"{name}|{spot.name}") for spot in inner]
    yield from trained
    yield from (s for s in plain if not any(_equal(s.tensors, t.tensors) for t in trained))


def _equal(a: dict[str, Stored], b: dict[str, Stored]) -> bool:
    return a.keys() == b.keys() and all(
        a[name].shape == b[name].shape and np.array_equal(a[name].bits(), b[name].bits())
        for name in a
    )


def output(made: Output) -> tuple[str, Node]:
    """One dictionary of tensors, for ``oneflow.load``."""
    return "oneflow", {**made.tensors, **made.optimizer}


FORMAT = Format(
    name="oneflow",
    about="our own names, for oneflow.load; flowvision",
    layouts=(STATE, RESNET_CLASSIFIER, RESNET_ENCODER),
    places=own_places,
    containers=CONTAINERS,
    arithmetic=(*ARITHMETIC, Resnet()),
    output=output,
)
