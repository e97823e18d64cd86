"""The names that Paddle generates for the parameters of a model.

Paddle numbers the layers of each class in the order in which a process builds them, and finds the
state of an optimizer by these names alone. The names here are those of a process that builds one
model and nothing before. In a layer, weight and statistics are w_0, w_1, ...; the bias is b_0.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from triptych.core.files.tree import Stored
from triptych.core.formats.rules import PADDLE

WEIGHTS = ("weight", *PADDLE.values())
"""Last words of the names of a layer's tensors, in the order of their numbers."""
TOKENS = {"cls_token": "w_1", "pos_embed": "w_2"}
"""Parameters that a ViT has beside its layers, and the ends of their generated names."""
LEAVES = {*WEIGHTS, "bias", *TOKENS}
"""Last words of the names of parameters. Other tensors are buffers."""
REPLACED = "replaced"
"""Stands in an order of layers for a linear layer that was built and then replaced."""

Tensors = Mapping[str, Stored]


def named(tensors: Tensors, built: Sequence[str] = (), root: str = "") -> dict[str, Stored]:
    """The tensors with generated names.

    Args:
        tensors: by name in the file.
        built: prefixes of the layers in the order in which they are built; empty: ``residual``.
        root: generated name of the class of a ViT.
    """
    parts = _parts(tensors)
    counts: Counter[str] = Counter()
    generated: dict[str, str] = {}
    kind = ""
    for layer in built or residual(parts):
        leaves = {leaf: n for leaf, n in parts.get(layer, {}).items() if leaf in LEAVES}
        if not leaves and layer != REPLACED:
            continue
        kind = _kind({leaf: tensors[name].shape for leaf, name in leaves.items()}, kind, root)
        weights = [leaf for leaf in WEIGHTS if leaf in leaves]
        ends = {leaf: f"w_{i}" for i, leaf in enumerate(weights)} | {"bias": "b_0"} | TOKENS
        for leaf, name in leaves.items():
            generated[name] = f"{kind}_{counts[kind]}.{ends[leaf]}"
        counts[kind] += 1
    buffers = (name for name in tensors if name not in generated)
    generated |= {name: f"eager_tmp_{i}" for i, name in enumerate(buffers)}
    return {name: replace(tensor, unique=generated[name]) for name, tensor in tensors.items()}


def layers_of(tensors: Iterable[str]) -> list[str]:
    """The prefixes of the layers, in the order of the file."""
    return list(_parts(tensors))


def residual(layers: Iterable[str]) -> list[str]:
    """The order in which a ResNet is built: the shortcut of a block before its convolutions.

    Args:
        layers: prefixes in the order of the file. The empty one holds buffers alone.
    """
    order = [layer for layer in layers if layer]

    def place(layer: str) -> float:
        block, shortcut, _ = layer.partition("downsample.")
        first = next(i for i, other in enumerate(order) if other.startswith(block))
        return first - 0.5 if shortcut else order.index(layer)

    return sorted(order, key=place)


def _parts(tensors: Iterable[str]) -> dict[str, dict[str, str]]:
    """Prefix of each layer -> last word -> whole name."""
    parts: dict[str, dict[str, str]] = {}
    for name in tensors:
        layer, _, leaf = name.rpartition(".")
        parts.setdefault(layer, {})[leaf] = name
    return parts


def _kind(shapes: Mapping[str, tuple[int, ...]], before: str, root: str) -> str:
    """The generated name of a layer's class.

    Args:
        shapes: of its tensors, by last word; empty: a replaced layer.
        before: generated name of the class of the layer that was built before.
        root: as in ``named``.
    """
    if TOKENS.keys() & shapes:
        return root
    if "_mean" in shapes:
        return "batch_norm2d" if before == "conv2d" else "batch_norm1d"
    classes = {1: "layer_norm", 2: "linear", 4: "conv2d"}
    return classes[len(shapes.get("weight", (0,)))] if shapes else "linear"
