"""ViTs of Hugging Face's transformers: a folder with ``config.json`` and the weights.

Query, key and value are three matrices. The names of a classifier have the prefix ``vit.``, those
of an encoder alone have none. The pooler after the class token has no canonical twin. Heads, image
size and the epsilon of the norms stand in ``config.json``.
"""

from collections.abc import Iterator
from dataclasses import replace

from triptych.core.config.spec import VitSpec
from triptych.core.errors import UserError
from triptych.core.files.tree import Content, Node
from triptych.core.formats.arithmetic import Vit
from triptych.core.formats.changes import Facts, Joined
from triptych.core.formats.format import Format, Layout, Output, Place, place, places, tensors_of
from triptych.core.formats.rules import Rule, Table, under
from triptych.core.formats.single import SUPERVISED

CONFIG = "config.json"
BLOCK = "encoder.layer.{i}."
BOTH = ("weight", "bias")
PREFIX = "vit."
PARTS = {
    "layernorm_before": "norm1",
    "attention.output.dense": "attn.proj",
    "layernorm_after": "norm2",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}
"""Names of the layers of a block, in the file and here."""


def _qkv(leaf: str) -> Rule:
    names = tuple(f"{BLOCK}attention.attention.{part}.{leaf}" for part in ("query", "key", "value"))
    return Rule(names, f"blocks.{{i}}.attn.qkv.{leaf}", Joined(3))


VIT = [
    Rule("embeddings.cls_token", "cls_token"),
    Rule("embeddings.position_embeddings", "pos_embed"),
    Rule("embeddings.patch_embeddings.projection.{leaf}", "patch_embed.proj.{leaf}"),
    *(_qkv(leaf) for leaf in BOTH),
    *(Rule(f"{BLOCK}{a}.{{leaf}}", f"blocks.{{i}}.{b}.{{leaf}}") for a, b in PARTS.items()),
    Rule("layernorm.{leaf}", "norm.{leaf}"),
]
CLASSIFIER = Layout(
    "a ViT classifier",
    "classifier",
    Table(
        *under(PREFIX, "student.encoder.", VIT),
        Rule("classifier.{leaf}", "student.classifier.{leaf}"),
    ),
    ("classifier.weight",),
    SUPERVISED,
    "vit",
    beside=(f"{PREFIX}pooler.dense.{{leaf}}",),
)
ENCODER = Layout(
    "a ViT encoder",
    "encoder",
    Table(*under("", "student.encoder.", VIT)),
    ("embeddings.cls_token",),
    encoder="vit",
    beside=("pooler.dense.{leaf}",),
)
INNER = replace(
    CLASSIFIER, about=ENCODER.about, kind="encoder", marks=(f"{PREFIX}embeddings.cls_token",),
    methods=(),
)  # fmt: skip


def _places(content: Content) -> Iterator[Place]:
    """The weights, which a large model has in several files."""
    tree = content.tree if isinstance(content.tree, dict) else {}
    shards = [name for name in tree if str(name).startswith(("model-0", "pytorch_model-0"))]
    if shards:
        yield place(
            "the shards", {k: v for name in shards for k, v in tensors_of(tree[name]).items()}
        )
    yield from places(content)


FACTS = {
    "num_attention_heads": "model.heads",
    "layer_norm_eps": "model.layer_norm_eps",
    "image_size": "model.image_size",
}
"""Keys of the spec, by those of the configuration."""


def _config(content: Content) -> dict[str, Node]:
    tree = content.tree if isinstance(content.tree, dict) else {}
    found = tree.get(CONFIG)
    return found if isinstance(found, dict) else {}


def _facts(content: Content) -> Facts:
    config = _config(content)
    return {key: config[name] for name, key in FACTS.items() if name in config}


def _fault(content: Content) -> str:
    """What the configuration says that no encoder here does."""
    act = _config(content).get("hidden_act", "gelu")
    return "" if act == "gelu" else f"{CONFIG}: hidden_act is {act!r}; expected 'gelu'"


def _output(output: Output) -> tuple[str, Node]:
    """A folder for ``from_pretrained`` of ``ViTModel`` or ``ViTForImageClassification``."""
    model = output.spec.model
    if not isinstance(model, VitSpec) or model.stem == "conv" or model.fc_norm:
        raise UserError(
            "model: transformers' ViT has a patch projection and the last norm before the pooling; "
            "this encoder has not"
        )
    head = output.tensors.get("classifier.weight")
    config = {
        "architectures": ["ViTModel" if head is None else "ViTForImageClassification"],
        "model_type": "vit",
        "hidden_size": model.width,
        "num_hidden_layers": model.depth,
        "num_attention_heads": model.heads,
        "intermediate_size": int(model.width * model.mlp_ratio),
        "hidden_act": "gelu",
        "layer_norm_eps": model.layer_norm_eps,
        "image_size": list(model.size) if model.size[0] != model.size[1] else model.size[0],
        "patch_size": model.patch_size,
        "num_channels": model.channels,
        "qkv_bias": True,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    if head is not None:
        names = [f"LABEL_{number}" for number in range(head.shape[0])]
        config["id2label"] = {str(number): name for number, name in enumerate(names)}
        config["label2id"] = {name: number for number, name in enumerate(names)}
    return "folder", {CONFIG: config, "model.safetensors": output.tensors}


NAMES = {
    "class token": "embeddings.cls_token",
    "positions": "embeddings.position_embeddings",
    "patches": "embeddings.patch_embeddings.projection",
    "first norm": f"{BLOCK}layernorm_before",
    "query": f"{BLOCK}attention.attention.query",
    "key": f"{BLOCK}attention.attention.key",
    "value": f"{BLOCK}attention.attention.value",
    "attention": f"{BLOCK}attention.output.dense",
    "second norm": f"{BLOCK}layernorm_after",
    "hidden": f"{BLOCK}intermediate.dense",
    "output": f"{BLOCK}output.dense",
    "last norm": "layernorm",
}
"""Names of the parts of a ViT in its forward pass."""

FORMAT = Format(
    name="huggingface",
    about="transformers (huggingface/transformers)",
    layouts=(CLASSIFIER, ENCODER, INNER),
    keys=frozenset({CONFIG}),
    places=_places,
    facts=_facts,
    fault=_fault,
    arithmetic=(Vit({"student": PREFIX}, NAMES, qkv="separate"), Vit(names=NAMES, qkv="separate")),
    output=_output,
)
