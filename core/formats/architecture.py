"""What the shapes of an encoder's tensors tell about its architecture."""

from collections.abc import Mapping
from fractions import Fraction
from math import isqrt
from typing import NamedTuple, cast

from triptych.core.config.spec import ModelSpec
from triptych.core.parameters import encoder

FIRST = {"cls_token", "conv1.weight"}
"""Names of the first tensors of an encoder."""

RANKS = {
    "encoder.conv1.weight": 4,
    "encoder.cls_token": 3,
    "encoder.pos_embed": 3,
    "encoder.patch_embed.proj.weight": 4,
    "encoder.patch_embed.proj.0.weight": 4,
    "encoder.blocks.0.mlp.fc1.weight": 2,
    "encoder.blocks.0.mlp.fc1.bias": 1,
    "projector.0.weight": 2,
    "projector.2.weight": 2,
    "predictor.0.weight": 2,
    "classifier.weight": 2,
    "decoder.mask_token": 3,
    "image_predictor.hidden.weight": 2,
    "memory.queue": 2,
    "memory.words": 2,
}
"""Number of dimensions of the tensors whose shapes show the architecture, without the branch."""

Shapes = Mapping[str, tuple[int, ...]]


def architecture(shapes: Shapes) -> dict[str, object]:
    """The properties that the shapes show, by name. A property that they do not show is absent.

    Args:
        shapes: of an encoder's tensors, by canonical name without a prefix.
    """
    if "conv1.weight" in shapes:
        return _resnet(shapes)
    stem = "patch_embed.proj.0.weight"
    found: dict[str, object] = {"kind": "ViT"}
    found["stem"] = "conv" if stem in shapes else "patch"
    if len(token := shapes.get("cls_token", ())) == 3:
        found["width"] = token[2]
    found["depth"] = len({name.split(".")[1] for name in shapes if name.startswith("blocks.")})
    hidden = shapes.get("blocks.0.mlp.fc1.weight", ())
    if len(hidden) == 2:
        found["mlp width"] = hidden[0]
    patch = shapes.get("patch_embed.proj.weight", ())
    if len(patch) == 4:
        found["patch size"] = patch[3]
    first = patch or shapes.get(stem, ())
    if len(first) == 4:
        found["channels"] = first[1]
    return found


def _resnet(shapes: Shapes) -> dict[str, object]:
    blocks = {tuple(name.split(".")[:2]) for name in shapes if name.startswith("layer")}
    stages = [sum(stage == f"layer{i}" for stage, _ in blocks) for i in range(1, 5)]
    found: dict[str, object] = {"kind": "ResNet"}
    found["blocks"] = "-".join(map(str, stages))
    found["convolutions in a block"] = 3 if "layer1.0.conv3.weight" in shapes else 2
    first = shapes["conv1.weight"]
    if len(first) == 4:
        found.update(
            zip(("width", "channels", "first kernel"), (*first[:2], first[3]), strict=True)
        )
    return found


def difference(ours: Shapes, theirs: Shapes) -> str | None:
    """In which properties a file's encoder is not the model's, in one line; None: in none.

    Args:
        ours: shapes of the model's tensors.
        theirs: shapes of the file's tensors.
    """
    model, file = architecture(ours), architecture(theirs)
    if model["kind"] != file["kind"]:
        return f"the file has a {_listed(file)}; the model is a {_listed(model)}"
    other = [key for key in model if key in file and file[key] != model[key]]
    if not other:
        return None
    a, b = (_listed({key: found[key] for key in other}) for found in (file, model))
    return f"the file has {a}; the model {b}"


def _listed(found: Mapping[str, object]) -> str:
    return ", ".join(str(v) if k == "kind" else f"{k} {v}" for k, v in found.items())


def model_section(shapes: Shapes) -> dict[str, object]:
    """The keys of ``model`` that shapes show. Those that they do not show are absent.

    Args:
        shapes: of an encoder's tensors, without a prefix.
    """
    found = architecture(shapes)
    if found["kind"] == "ResNet":
        return {
            "name": "resnet",
            "block": "bottleneck" if found["convolutions in a block"] == 3 else "basic",
            "depths": [int(n) for n in str(found["blocks"]).split("-")],
            "width": found.get("width"),
            "channels": found.get("channels"),
            "stem": "imagenet" if found.get("first kernel") == 7 else "small",
        }
    model: dict[str, object] = {"name": "vit"}
    model |= {key: found[key] for key in ("width", "depth", "stem", "channels") if key in found}
    patch = 16 if found["stem"] == "conv" else found.get("patch size")
    model["patch_size"] = patch
    if "mlp width" in found and found.get("width"):
        ratio = Fraction(cast(int, found["mlp width"]), cast(int, found["width"]))
        model["mlp_ratio"] = int(ratio) if ratio.denominator == 1 else float(ratio)
    table = shapes.get("pos_embed", ())
    side = isqrt(max(table[1] - 1, 0)) if len(table) == 3 else 0
    if side and side**2 == table[1] - 1 and isinstance(patch, int):
        model["image_size"] = side * patch
    if "fc_norm.weight" in shapes:
        model["fc_norm"] = True
    return model


def encoder_shapes(shapes: Shapes, branch: str = "student") -> Shapes:
    """The shapes of one encoder without its prefix."""
    prefix = f"{branch}.encoder."
    return {n.removeprefix(prefix): s for n, s in shapes.items() if n.startswith(prefix)}


def other_encoder(model: ModelSpec, theirs: Shapes) -> str | None:
    """``difference`` between the encoder of a spec and that of a file; None without an encoder."""
    if not FIRST & theirs.keys():
        return None
    return difference({param.name: param.shape for param in encoder(model)}, theirs)


class Contradiction(NamedTuple):
    """A tensor whose shape cannot stand beside the others.

    Attributes:
        name: canonical name.
        reason: its shape and what it should be.
    """

    name: str
    reason: str


def contradiction(shapes: Shapes) -> Contradiction | None:
    """The first tensor whose shape no model has, or excludes that matrices are (out, in).

    The latter file has another layout than was assumed, for example that of Paddle.

    Args:
        shapes: by canonical name, with prefixes.
    """
    for name, shape in shapes.items():
        rank = RANKS.get(name.removeprefix("student.").removeprefix("teacher."), len(shape))
        if len(shape) != rank or (0 in shape and rank > 1):
            return Contradiction(name, f"{shape}: expected {rank} dimensions, none of them empty")
    for branch in ("student.encoder.", "teacher.encoder."):
        token = shapes.get(f"{branch}cls_token", ())
        if not token:
            continue
        width = token[-1]
        hidden = shapes.get(f"{branch}blocks.0.mlp.fc1.bias", (4 * width,))[0]
        wanted = {
            "attn.qkv": (3 * width, width),
            "mlp.fc1": (hidden, width),
            "mlp.fc2": (width, hidden),
        }
        for part, shape in wanted.items():
            name = f"{branch}blocks.0.{part}.weight"
            if (found := shapes.get(name, shape)) == shape[::-1] != shape:
                return Contradiction(
                    name, f"{found}: matrices are (in, out); expected (out, in) = {shape}"
                )
    return None
