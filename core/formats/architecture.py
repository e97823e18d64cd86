"""What the shapes of an encoder's tensors tell about its architecture."""

from collections.abc import Mapping

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
