"""The spec of a run, as far as a file of weights shows it.

Shapes show widths, depths and sizes. What no shape shows, such as the number of heads, comes from
the file's own meta data or from the caller. It is never guessed.
"""

from collections.abc import Sequence
from pathlib import Path

from triptych.core import config
from triptych.core.config import yaml12
from triptych.core.config.spec import RunSpec
from triptych.core.errors import UserError, printable
from triptych.core.formats.architecture import Shapes, encoder_shapes, model_section
from triptych.core.formats.continuing import sections as sections_of
from triptych.core.formats.detection import Source
from triptych.core.formats.loading import read_weights

NEEDED = (
    ("model", "vit", "heads"),
    ("model", "vit", "image_size"),
    ("method", "moca", "decoder_heads"),
)
"""Section, its name and key of what shapes do not show, or not always."""

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
    if any(name.startswith(PREDICTOR) for name in shapes):
        return _moco_v3(shapes)
    if classifier := shapes.get("student.classifier.weight"):
        return {"name": "finetune", "classes": classifier[0]}
    return {}


def _queue(shapes: Shapes) -> dict[str, object]:
    dim, size = shapes["memory.queue"]
    found: dict[str, object] = {"name": "moco_v1", "output_dim": dim, "queue_size": size}
    if f"{PROJECTOR}2.weight" in shapes:
        found |= {"name": "moco_v2", "hidden_dim": shapes[f"{PROJECTOR}0.weight"][0]}
    return found


def _moco_v3(shapes: Shapes) -> dict[str, object]:
    projector, predictor = (_matrices(shapes, prefix) for prefix in (PROJECTOR, PREDICTOR))
    return {
        "name": "moco_v3",
        "hidden_dim": shapes[f"{PREDICTOR}0.weight"][0],
        "output_dim": shapes[predictor[-1]][0],
        "projector_layers": len(projector),
        "predictor_layers": len(predictor),
        "predictor_last_norm": _last_norm(shapes, PREDICTOR, predictor),
    }


def _matrices(shapes: Shapes, prefix: str) -> list[str]:
    """The names of a head's linear layers, in forward order."""
    names = [n for n, s in shapes.items() if n.startswith(prefix) and len(s) == 2]
    return sorted(names, key=lambda name: int(name.removeprefix(prefix).split(".")[0]))


def _last_norm(shapes: Shapes, prefix: str, matrices: Sequence[str]) -> bool:
    last = int(matrices[-1].removeprefix(prefix).split(".")[0])
    return f"{prefix}{last + 1}.running_mean" in shapes


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
    branch = "student" if encoder_shapes(shapes) else "teacher"
    sections: dict[str, dict[str, object]] = {
        "model": model_section(encoder_shapes(shapes, branch)),
        "method": method_section(shapes) or {"name": "moco_v3"},
        "train": {"steps": 1},
    }
    if "fc_norm.weight" in encoder_shapes(shapes, branch):
        sections["method"]["pooling"] = "mean"
    given = {text.partition("=")[0].strip() for text in overrides}
    shown = sections_of(source.optimizer, shapes) if source.optimizer else {}
    for key, value in {**shown, **source.facts}.items():
        section, _, name = key.partition(".")
        if section == "optim" and given & {"optim", "optim.name"}:
            continue  # the keys of another optimizer do not fit
        if _counts(section, source.layout.kind, str(sections["model"]["name"])):
            sections.setdefault(section, {})[name] = value
    missing = [
        f"{section}.{key}"
        for section, name, key in NEEDED
        if sections[section]["name"] == name
        and key not in sections[section]
        and f"{section}.{key}" not in given
    ]
    if missing:
        keys = " ".join(f"-o {key}=NUMBER" for key in missing)
        names = " and ".join(missing)
        raise UserError(
            f"{path}: {source.format.name}: the file does not say {names}; give -c SPEC or {keys}"
        )
    return config.loads(yaml12.dump(sections), f"{path} (as its tensors show)", overrides)


def _counts(section: str, kind: str, encoder: str) -> bool:
    """Whether facts about a section concern a file: all about models are about ViTs."""
    if section in ("method", "optim"):
        return kind == "pretraining"
    return section != "model" or encoder == "vit"


def read_spec(path: Path, overrides: Sequence[str] = ()) -> RunSpec:
    """The spec of the run that a file of weights comes from, or of a run with its model.

    Args:
        path: as in ``loading.load_weights``. A checkpoint of our own has its spec.
        overrides: as in ``spec_of``.

    Raises:
        UserError: the file is unusable, or as in ``spec_of``.
    """
    words = dict(text.split("=", 1) for text in overrides if "=" in text)
    facts = {key: int(value) for key, value in words.items()
             if key.startswith("model.") and value.isdecimal()}  # fmt: skip
    manifest, source = read_weights(path, None, average=_truth(words.get("init.average")),
                                    facts=facts)  # fmt: skip
    if manifest:
        return config.loads(yaml12.dump(manifest.spec), str(path), overrides)
    return spec_of(source, overrides)


def _truth(word: str | None) -> bool | None:
    return {"true": True, "false": False}.get(word or "")
