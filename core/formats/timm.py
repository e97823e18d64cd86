"""timm's networks (huggingface/pytorch-image-models), and what other tools write under its names.

A training file has a state dict, averaged weights, and the arguments of the program; a folder for
the Hugging Face hub has ``config.json`` and ``model.safetensors``. Both name an architecture, whose
sizes the arguments may replace, so the name tells nothing. A classifier on the mean of the tokens
has the norm ``fc_norm`` behind the mean and none before.
"""

from triptych.core.config.spec import VitSpec
from triptych.core.errors import UserError
from triptych.core.files.tree import Content, Node
from triptych.core.formats.arithmetic import SINGLE, networks
from triptych.core.formats.changes import Facts
from triptych.core.formats.format import Format, Output
from triptych.core.formats.single import (
    RESNET_CLASSIFIER,
    RESNET_ENCODER,
    VIT_CLASSIFIER,
    VIT_ENCODER,
)

CONFIG = "config.json"
ARGUMENTS = {"num_heads": "model.heads", "img_size": "model.image_size"}
"""Keys of the spec, by the names of a model's arguments."""
ANY_VIT = "vit_base_patch16_224"
"""A name for a ViT of any size: the arguments replace all of its sizes."""


def _facts(content: Content) -> Facts:
    """What ``config.json`` or the program's arguments say about the model."""
    config, program = _entry(content.tree, CONFIG), _entry(content.tree, "args")
    facts: dict[str, object] = {}
    size = _entry(config, "pretrained_cfg").get("input_size")
    if isinstance(size, list) and len(size) == 3:
        facts["model.image_size"] = size[1] if size[1] == size[2] else size[1:]
    arguments = (program, _entry(program, "model_kwargs"), _entry(config, "model_args"))
    for found in arguments:
        facts |= {key: found[n] for n, key in ARGUMENTS.items() if found.get(n) is not None}
    return facts


def _entry(node: Node, key: str) -> dict[str, Node]:
    found = node.get(key) if isinstance(node, dict) else None
    return found if isinstance(found, dict) else {}


def _output(output: Output) -> tuple[str, Node]:
    """A state dict for ``timm.create_model(..., checkpoint_path=...)``, or a folder for the hub."""
    if not output.folder:
        return "torch", output.tensors
    return "folder", {CONFIG: _config(output), "model.safetensors": output.tensors}


def _config(output: Output) -> dict[str, Node]:
    """What ``timm.create_model("local-dir:...")`` needs to know about the model."""
    model = output.spec.model
    if not isinstance(model, VitSpec) or model.stem == "conv":
        raise UserError(
            "model: timm's arguments describe ViTs with a patch projection only; name a file that "
            "ends in .pth instead of a folder"
        )
    head = output.tensors.get("head.weight")
    classes = head.shape[0] if head is not None else 0
    pool = "avg" if model.fc_norm else "token"
    arguments = {
        "img_size": list(model.size),
        "patch_size": model.patch_size,
        "in_chans": model.channels,
        "num_classes": classes,
        "global_pool": pool,
        "embed_dim": model.width,
        "depth": model.depth,
        "num_heads": model.heads,
        "mlp_ratio": model.mlp_ratio,
    }
    about = {
        "input_size": [model.channels, *model.size],
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }
    return {
        "architecture": ANY_VIT,
        "num_classes": classes,
        "num_features": model.width,
        "global_pool": pool,
        "model_args": arguments,
        "pretrained_cfg": {**about, "num_classes": classes},
    }


FORMAT = Format(
    name="timm",
    about="timm (huggingface/pytorch-image-models)",
    layouts=(VIT_CLASSIFIER, VIT_ENCODER, RESNET_CLASSIFIER, RESNET_ENCODER),
    keys=frozenset(
        {"state_dict", "state_dict_ema", "args", "version", "metric", "amp_scaler", CONFIG}
    ),
    facts=_facts,
    constants={"model.layer_norm_eps": 1e-6},
    arithmetic=networks(SINGLE),
    output=_output,
)
