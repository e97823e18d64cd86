"""Files that other systems wrote, with their hashes and features: see golden/formats/README.md."""

import hashlib
import json
import shutil
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from triptych.core import parameters
from triptych.core.config.spec import RunSpec
from triptych.core.contracts import State
from triptych.core.engine import Engine
from triptych.core.files import reading
from triptych.core.files.tree import Content, Stored
from triptych.core.formats.detection import Source, recognise
from triptych.core.formats.specs import spec_of
from triptych.core.parameters import initial_state
from triptych.core.reference.layers import EVALUATION, head

FILES = Path(__file__).resolve().parents[1] / "golden" / "formats"
NAMES = sorted(path.name.removesuffix(".golden.json") for path in FILES.glob("*.golden.json"))
"""The described files. A folder of many files is packed, and Paddle's files have an ending."""
PADDLE = ["plsc_moco_v3_vit.pd", "paddlefleetx_moco_v2_bottleneck"]
TRAINED = ["libai_moco_v3_vit", *PADDLE]
"""Files with an optimizer, of systems whose kernels round numbers to float32."""
HASH = 16
"""Hexadecimal digits of a hash that the descriptions keep."""


@lru_cache
def description(file: str) -> dict[str, Any]:
    """What is known about a file: format, architecture, image_size, tensors, optimizer."""
    return json.loads((FILES / f"{file}.golden.json").read_text())


def golden(file: str) -> dict[str, np.ndarray]:
    """The features of the system itself."""
    with np.load(FILES / f"{file}.golden.npz") as arrays:
        return dict(arrays)


def path_of(file: str, folder: Path) -> Path:
    """A file. A folder of many files is packed; it is unpacked into ``folder``."""
    packed = FILES / f"{file}.tar.xz"
    if packed.exists():
        shutil.unpack_archive(packed, folder / file)
        return folder / file
    return next(path for path in (FILES / file, FILES / f"{file}.pdparams") if path.exists())


def content_of(file: str, folder: Path) -> Content:
    """The content of a file; ``folder`` is as in ``path_of``."""
    return reading.read(path_of(file, folder))


def facts_of(file: str) -> dict[str, Any]:
    """What a user has to say about a model: the number of heads, which no file shows."""
    heads = description(file)["architecture"].get("heads")
    return {"model.heads": heads} if heads else {}


def source_of(file: str, folder: Path) -> Source:
    """A recognised file. Of plain and averaged weights, the described ones are taken."""
    average = description(file).get("average")
    return recognise(content_of(file, folder), average=average, facts=facts_of(file))


def spec_of_source(file: str, source: Source, *overrides: str) -> RunSpec:
    """The spec of a file, for training in float64. Parts that the file lacks are small."""
    given = [f"{key}={value}" for key, value in facts_of(file).items()]
    if "student.projector.0.bias" in source.tensors and "memory.queue" not in source.tensors:
        given.append("method.queue_size=256")
    if all(".encoder." in name for name in source.tensors):
        given.append("method.hidden_dim=8")
    return spec_of(source, [*given, "precision=float64", "train.batch_size=8", *overrides])


def digest(tensor: Stored) -> list[Any]:
    """Type, shape and short hash of a tensor, as in the descriptions."""
    raw = np.ascontiguousarray(tensor.bits()).tobytes()
    return [tensor.dtype, list(tensor.shape), hashlib.sha256(raw).hexdigest()[:HASH]]


def state_of(source: Source, spec: RunSpec) -> State:
    """The whole state of a file in float64. What a file of one encoder lacks is drawn."""
    stored = {**source.tensors, **source.fresh}
    state = {**initial_state(spec), **{name: t.array() for name, t in stored.items()}}
    wide = {n: a.astype(np.float64) if a.dtype.kind == "f" else a for n, a in state.items()}
    return {param.name: wide[param.name] for param in parameters.table(spec)}


def architecture_of(spec: RunSpec) -> dict[str, Any]:
    """The entries of a description's architecture that a spec has."""
    model, method = spec.model.model_dump(), spec.method.model_dump()
    ours = {
        "stem_width": "width",
        "layers": "depths",
        "dim": "output_dim",
        "queue": "queue_size",
        "mlp_dim": "hidden_dim",
    }
    both = {**method, **model, "feature": spec.model.features}
    found = {theirs: both.get(key) for theirs, key in ours.items()}
    block = {"basic": "BasicBlock", "bottleneck": "Bottleneck"}.get(model.get("block"))
    family = "ViT" if "heads" in model else "ResNet"
    return {
        **both,
        **found,
        "layers": list(found["layers"] or ()),
        "block": block,
        "family": family,
    }


def images(size: int) -> np.ndarray:
    """The two images of the descriptions."""
    numbers = [np.random.Generator(np.random.Philox(key=9000 + i)) for i in range(2)]
    pixels = [np.float32(g.standard_normal((3, size, size))) for g in numbers]
    return np.stack(pixels).astype(np.float64)


def features(engine: Engine, spec: RunSpec, state: State, size: int) -> dict[str, np.ndarray]:
    """The features of an engine under the names of the golden ones."""
    found: dict[str, np.ndarray] = {}
    labelled = spec.method.labelled
    for branch in ("student",) if labelled else ("student", "teacher"):
        made = engine.embed(images(size), branch=branch, tokens="all", projection=not labelled)
        found[f"{branch}/tokens"] = made["final"]
        found[f"{branch}/feature"] = made["final"][:, 0]
        if not labelled:
            found[f"{branch}/projection"] = made["projection"]
    if labelled:
        found["student/logits"] = engine.classify(images(size))[0]
    predictor = parameters.parts(spec).predictor
    if predictor.layers:
        x = found["student/projection"]
        found["student/prediction"] = head(state, "student.predictor", x, predictor, EVALUATION)
    return found
