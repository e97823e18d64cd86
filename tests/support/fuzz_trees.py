"""Converts and loads training checkpoints in which entries are lost, exchanged or replaced.

    python tests/support/fuzz_trees.py 2000

The files are whole, so that the readers pass what is in them. Each must be converted, or refused
in lines that can be printed, in less than 5 s of processor time.
"""

import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from triptych.core import config, parameters
from triptych.core.config import yaml12
from triptych.core.config.spec import InitSpec, RunSpec
from triptych.core.errors import UserError
from triptych.core.files import reading, saving
from triptych.core.files.tree import Node, Record, Stored
from triptych.core.formats import destination, load_encoder, load_training_state
from triptych.core.formats.conversion import Request, plan
from triptych.core.formats.moments import KINDS
from triptych.core.formats.opening import SPEC
from triptych.core.formats.selfcheck import check
from triptych.core.launch import REFERENCE

VIT = {"name": "vit", "width": 8, "depth": 1, "heads": 2, "image_size": 32}
RESNET = {"name": "resnet", "block": "basic", "depths": [1, 1, 1, 1], "width": 2, "image_size": 32}
HEADS = {"hidden_dim": 4, "output_dim": 4}
RUNS = {
    "canonical": (VIT, {"name": "moco_v3", **HEADS}, "adamw"),
    "moco_v3": (VIT, {"name": "moco_v3", **HEADS}, "adamw"),
    "plsc": (VIT, {"name": "moco_v3", **HEADS}, "adamw"),
    "mmpretrain": (RESNET, {"name": "moco_v2", **HEADS, "queue_size": 16}, "sgd"),
    "moco": (RESNET, {"name": "moco_v2", **HEADS, "queue_size": 16}, "sgd"),
}
"""Format -> model, method and optimizer of a small training checkpoint."""

CONTAINERS = {"torch zip": "torch", "paddle": "paddle"}

SHAPES = ((), (0,), (1,), (2, 0, 3), (4, 4, 4, 4))
REPLACED: tuple[Node, ...] = (
    *(None, True, -1, 0, 2**70, 0.5, np.nan, "", "x" * 100, "\x1b[31m\n", [], {}, (1, "2")),
    *({"params": [0, 1]}, [{}], {0: {}}, {"step": -1}, {"": {"": {}}}),
    *(
        Stored.of(np.zeros(shape, np.float32))
        for shape in ((), (0,), (1,), (2, 0, 3), (4, 4, 4, 4))
    ),
    Stored.of(np.full((8, 8), np.nan, np.float32)),
    Stored.of(np.array(-(2**62))),
    Stored.of(np.array([True, False])),
    Stored.of(np.ones((8,), np.complex64)),
)
"""What an entry is replaced by."""


def specs(name: str) -> RunSpec:
    """The spec of a small run."""
    model, method, optimizer = RUNS[name]
    sections = {
        "model": model,
        "method": method,
        "optim": {"name": optimizer},
        "train": {"steps": 1, "batch_size": 8},
    }
    return config.loads(yaml12.dump(sections), "fuzz")


def checkpoint(name: str, folder: Path) -> Path:
    """A training checkpoint of a system."""
    spec = specs(name)
    state = {**parameters.initial_state(spec), "optimizer.step": np.array(1)}
    for kind in KINDS[spec.optim.name]:
        for param in parameters.table(spec):
            if param.trainable:
                state[f"optimizer.{kind}.{param.name}"] = np.ones(param.shape, np.float32)
    tree = {SPEC: config.dump(spec), **{key: Stored.of(array) for key, array in state.items()}}
    own, path = folder / "own.pth", folder / name
    saving.write(own, tree, "torch")
    if name == "canonical":
        return own.rename(path)
    made = plan(own, Request(name))
    assert not made.problems, made.problems
    destination.write(path, made, lambda done: None)
    return path


def copied(node: Node) -> Node:
    """A tree of its own, whose tensors are shared."""
    if isinstance(node, Record):
        return Record(node.kind, {key: copied(value) for key, value in node.items()})
    if isinstance(node, dict):
        return {key: copied(value) for key, value in node.items()}
    return [copied(value) for value in node] if isinstance(node, list) else node


def inner(node: Node) -> Iterator[Any]:
    """The dictionaries and lists of a tree that hold something."""
    if not isinstance(node, dict | list) or not node:
        return
    yield node
    for value in node.values() if isinstance(node, dict) else node:
        yield from inner(value)


def changed(tree: Node, draw: random.Random) -> Node:
    """A copy with one to three changed entries."""
    tree = copied(tree)
    for _ in range(draw.randint(1, 3)):
        # Top and state dict have few or many entries; each level is as likely.
        spots = [*inner(tree)]
        if not spots:
            return tree
        node = draw.choice([spots[0], draw.choice(spots), draw.choice(spots)])
        places: list[Any] = list(node) if isinstance(node, dict) else list(range(len(node)))
        place, other = draw.choice(places), draw.choice(places)
        kind = draw.randrange(6)
        if kind == 0:
            del node[place]
        elif kind == 1:
            node[place], node[other] = node[other], node[place]
        elif kind == 2 and isinstance(node, dict):
            node[draw.choice((f"{place}x", "module", 7, "", "a.b", str(place)[1:]))] = node.pop(
                place
            )
        elif kind == 3 and isinstance(node[place], Stored):
            node[place] = reshaped(node[place], draw)
        else:
            node[place] = draw.choice(REPLACED)
    return tree


def reshaped(tensor: Stored, draw: random.Random) -> Stored:
    """A tensor with other dimensions."""
    ways: list[Callable[[Any], Any]] = [
        *(np.transpose, lambda a: a[None], lambda a: a.reshape(-1), lambda a: a[:1]),
        *(lambda a: np.concatenate([a, a]) if a.ndim else a, lambda a: a.astype(np.int32)),
        lambda a: a.astype(np.float16),
    ]
    array = draw.choice(ways)(tensor.array() if tensor.shape else np.ones(1))
    return replace(Stored.of(np.ascontiguousarray(array)), unique=tensor.unique)


def used(path: Path, name: str, draw: random.Random) -> str:
    """What becomes of a file in one of its uses."""
    spec, use = specs(name), draw.randrange(6)
    if use == 0:
        load_training_state(path, spec, lambda line: None)
        return "trained"
    if use == 1:
        load_encoder(path, spec, InitSpec())
        return "loaded"
    target = draw.choice(("canonical", name, "torch", "huggingface", "libai", "detectron2"))
    heads = ["model.heads=2"] if spec.model.name == "vit" else []
    branch = None if target in ("canonical", name, "torch") else "student"
    made = plan(path, Request(target, overrides=heads, branch=branch))
    if made.problems:
        raise UserError("\n".join(made.problems))
    check(made, REFERENCE)
    out = path.with_name("out")
    destination.write(out, made, lambda done: None)
    saving.remove(out)
    return "converted"


def fuzz(count: int, seed: int = 0) -> Counter[str]:
    """Counts of what became of ``count`` changed checkpoints."""
    draw, counts = random.Random(seed), Counter[str]()
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        contents = {name: reading.read(checkpoint(name, base)) for name in RUNS}
        path = base / "mutant.pth"
        for _ in range(count):
            name = draw.choice(list(contents))
            start = time.process_time()
            try:
                saving.write(path, changed(contents[name].tree, draw), _container(contents[name]))
                counts[used(path, name, draw)] += 1
            except UserError as error:
                counts["refused"] += 1
                lines = str(error).split("\n")
                assert all(line and line.isprintable() for line in lines), lines
            assert time.process_time() - start < 5, name
            assert not [p for p in base.iterdir() if p.name.startswith(("out", "."))]
    return counts


def _container(content: reading.Content) -> str:
    return CONTAINERS[content.container]


if __name__ == "__main__":
    print(dict(fuzz(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0)))
