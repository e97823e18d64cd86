"""The spec of a run, as far as a file of weights shows it.

Shapes show widths, depths and sizes. What no shape shows, such as the number of heads, comes from
the file's own meta data or from the caller. It is never guessed.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence

from triptych.core import config
from triptych.core.config import yaml12
from triptych.core.config.spec import RunSpec
from triptych.core.errors import UserError, printable
from triptych.core.formats import canonical
from triptych.core.formats.architecture import FIRST, Shapes, encoder_shapes, model_section
from triptych.core.formats.continuing import own_sections
from triptych.core.formats.continuing import sections as sections_of
from triptych.core.formats.detection import Source

NEEDED = (
    ("model", "vit", "heads"),
    ("model", "vit", "image_size"),
    ("model", "vit", "layer_norm_eps"),
    ("method", "moca", "decoder_heads"),
)
"""Section, its name and key of what shapes do not show, or not always."""

BATCH = 256
"""Images of a batch, if a file leaves it open."""
PREDICTOR, PROJECTOR = "student.predictor.", "student.projector."


def method_section(shapes: Shapes) -> dict[str, object]:
    """The keys of ``method`` that shapes show. An encoder alone has no method.

    Args:
        shapes: of all tensors, by canonical name.
    """
    if "memory.words" in shapes:
        return _moca(shapes)
    if "memory.queue" in shapes:
        return _queue(shapes)
    if {f"{PREDICTOR}0.weight", f"{PROJECTOR}0.weight"} <= shapes.keys():
        return _moco_v3(shapes)
    if f"{PROJECTOR}0.bias" in shapes:
        return _head(shapes)
    if classifier := shapes.get("student.classifier.weight"):
        return {"name": "finetune", "classes": classifier[0]}
    return {}


def _queue(shapes: Shapes) -> dict[str, object]:
    dim, size = shapes["memory.queue"]
    return {"output_dim": dim, **_head(shapes), "queue_size": size}


def _head(shapes: Shapes) -> dict[str, object]:
    """MoCo v1 or v2, whose heads have biases. A file without a queue does not show its size."""
    if f"{PROJECTOR}2.weight" not in shapes:
        return {"name": "moco_v1", **_output(shapes, 0)}
    hidden = shapes[f"{PROJECTOR}0.weight"][0]
    return {"name": "moco_v2", "hidden_dim": hidden, **_output(shapes, 2)}


def _output(shapes: Shapes, layer: int) -> dict[str, object]:
    weight = shapes.get(f"{PROJECTOR}{layer}.weight")
    return {"output_dim": weight[0]} if weight else {}


def _moco_v3(shapes: Shapes) -> dict[str, object]:
    projector, predictor = (_matrices(shapes, prefix) for prefix in (PROJECTOR, PREDICTOR))
    hidden, inner = (shapes[f"{prefix}0.weight"][0] for prefix in (PROJECTOR, PREDICTOR))
    return {
        "name": "moco_v3",
        "hidden_dim": hidden,
        "predictor_hidden_dim": None if inner == hidden else inner,
        "output_dim": shapes[predictor[-1]][0],
        "projector_layers": len(projector),
        "predictor_layers": len(predictor),
        "predictor_last_norm": _after(PREDICTOR, predictor, "running_mean") in shapes,
        "last_norm_affine": _after(PROJECTOR, projector, "weight") in shapes,
    }


def _matrices(shapes: Shapes, prefix: str) -> list[str]:
    """The names of a head's linear layers, in forward order."""
    names = [n for n, s in shapes.items() if n.startswith(prefix) and len(s) == 2]
    return sorted(names, key=lambda name: int(name.removeprefix(prefix).split(".")[0]))


def _after(prefix: str, matrices: Sequence[str], leaf: str) -> str:
    """The name of a tensor of the norm after the last linear layer of a head."""
    last = int(matrices[-1].removeprefix(prefix).split(".")[0])
    return f"{prefix}{last + 1}.{leaf}"


def _moca(shapes: Shapes) -> dict[str, object]:
    words, width = shapes["memory.words"]
    blocks = {n.split(".")[3] for n in shapes if n.startswith("student.decoder.blocks.")}
    hidden = shapes["student.image_predictor.hidden.weight"][0]
    return {
        "name": "moca",
        "words": words,
        "predictor_ratio": hidden / width,
        "decoder_width": shapes["student.decoder.mask_token"][2],
        "decoder_depth": len(blocks),
    }


def _fits_table(size: object, model: Mapping[str, object], shapes: Shapes) -> bool:
    """Whether an image size that a file states has as many patches as the position table."""
    pair = size if isinstance(size, list | tuple) and len(size) == 2 else (size, size)
    patch, table = model.get("patch_size"), shapes.get("pos_embed", ())
    if not isinstance(patch, int) or len(table) != 3:
        return False
    height, width = pair
    if not isinstance(height, int) or not isinstance(width, int):
        return False
    if height % patch or width % patch:
        return False
    return (height // patch) * (width // patch) == table[1] - 1


def spec_of(source: Source, overrides: Sequence[str] = ()) -> RunSpec:
    """The spec of a run with the model of a file.

    The spec of a file with an encoder alone has a method all the same, whose heads the file lacks.
    No file says how long to train; the spec has one step.

    Args:
        source: of the file.
        overrides: as in ``config.load``. They count before what the file says.

    Raises:
        UserError: the file does not show a key and no override gives it, or the keys contradict
            each other. The message names the keys.
    """
    shapes = source.shapes
    path = printable(str(source.content.path))
    encoder = encoder_shapes(shapes) or encoder_shapes(shapes, "teacher")
    if encoder and not FIRST & encoder.keys():
        raise UserError(
            f"{path}: {source.format.name}: of the encoder's first tensor "
            f"({' or '.join(sorted(FIRST))}), which shows the architecture, the file has none; "
            "give -c SPEC"
        )
    _check_stages(f"{path}: {source.format.name}", encoder)
    try:
        method = method_section(shapes)
    except LookupError as error:
        raise UserError(
            f"{path}: {source.format.name}: the heads lack {error}; give -c SPEC"
        ) from error
    sections: dict[str, dict[str, object]] = {
        "model": model_section(encoder),
        "method": method or {"name": "moco_v3"},
        "train": {"steps": 1},
    }
    if "memory.queue" in shapes:
        # A batch of more images than the queue has keys is refused.
        sections["train"]["batch_size"] = min(BATCH, shapes["memory.queue"][1])
    sections |= _images(sections["model"].get("channels", 3))
    if "fc_norm.weight" in encoder:
        sections["method"]["pooling"] = "mean"
    given = {text.partition("=")[0].strip() for text in overrides}
    for key, value in {**_optimizer(source), **source.facts}.items():
        section, _, name = key.partition(".")
        if key == "model.image_size" and not _fits_table(value, sections["model"], encoder):
            continue
        if section == "optim" and given & {"optim", "optim.name"}:
            continue  # the keys of another optimizer do not fit
        if _counts(section, source.layout.kind, str(sections["model"]["name"])):
            sections.setdefault(section, {})[name] = value
    missing = [*_missing(source, sections, given)]
    if missing:
        keys = " ".join(f"-o {key}=NUMBER" for key in missing)
        names = " and ".join(missing)
        raise UserError(
            f"{path}: {source.format.name}: the file does not say {names}; give -c SPEC or {keys}"
        )
    return config.loads(yaml12.dump(sections), f"{path} (as its tensors show)", overrides)


def _optimizer(source: Source) -> dict[str, object]:
    """The keys of ``optim`` and ``model`` that the state of an optimizer shows."""
    theirs = source.optimizer
    try:
        return sections_of(theirs, source.shapes) if theirs else own_sections(source.shapes)
    except UserError as error:
        raise UserError(f"{printable(str(source.content.path))}: {error}") from error


def _check_stages(file: str, encoder: Shapes) -> None:
    """Raises UserError if a stage of a ResNet has no tensor."""
    stages = [f"layer{number}" for number in range(1, 5)] if "conv1.weight" in encoder else []
    empty = [s for s in stages if not any(name.startswith(f"{s}.") for name in encoder)]
    if empty:
        raise UserError(
            f"{file}: a ResNet without tensors of {', '.join(empty)}; give a file of the whole "
            "encoder"
        )


def _images(channels: object) -> dict[str, dict[str, object]]:
    """The keys of ``data`` and ``augment`` that depend on the number of channels."""
    if channels == 3:
        return {}
    return {"data": {"channels": channels}, "augment": {"mean": [0.5], "std": [0.5]}}


def _missing(
    source: Source, sections: Mapping[str, Mapping[str, object]], given: Collection[str]
) -> Iterator[str]:
    """The keys that neither the file nor the caller says."""
    for section, name, key in NEEDED:
        # Our own files hold the key in their manifest.
        own = key == "layer_norm_eps" and source.layout is canonical.STATE
        known = own or key in sections[section] or f"{section}.{key}" in given
        if sections[section]["name"] == name and not known:
            yield f"{section}.{key}"


def _counts(section: str, kind: str, encoder: str) -> bool:
    """Whether facts about a section concern a file: all about models are about ViTs."""
    if section in ("method", "optim", "batch_norm"):
        return kind in ("pretraining", "any")
    return section != "model" or encoder == "vit"
