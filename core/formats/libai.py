"""LiBai's MoCo v3 and its ViT classifiers (Oneflow-Inc/libai).

A run folder has a file ``last_checkpoint`` that names the newest folder of weights, and this has a
folder of OneFlow for each of model, optimizer and scheduler. The blocks have Megatron's names. The
rows of query, key and value are stored head by head, and no file says the number of heads. The last
batch norms of the heads have gain and shift. Tensor-parallel runs save whole tensors. The optimizer
numbers trained tensors alone: first those with weight decay, then gains, shifts and biases.
"""

from collections.abc import Sequence

from triptych.core.config.spec import RunSpec
from triptych.core.files.tree import Node
from triptych.core.formats.arithmetic import Vit
from triptych.core.formats.changes import INTERLEAVED
from triptych.core.formats.format import Format, Layout, Output
from triptych.core.formats.moments import KINDS, Moments, Parameter, torch_options
from triptych.core.formats.optimizers import optimizer_state
from triptych.core.formats.rules import Rule, Table, fits, under
from triptych.core.formats.single import STUDENT, SUPERVISED

BRANCHES = {"student": "base_encoder", "teacher": "momentum_encoder"}
"""Prefixes in the file, by canonical one."""
BLOCK = {
    "input_layernorm": "norm1",
    "self_attention.query_key_value": "attn.qkv",
    "self_attention.dense": "attn.proj",
    "post_attention_layernorm": "norm2",
    "mlp.dense_h_to_4h": "mlp.fc1",
    "mlp.dense_4h_to_h": "mlp.fc2",
}
"""Canonical names of the layers in a block, by name in the file."""
EQUAL = ("cls_token", "pos_embed", "patch_embed.{rest}", "norm.{leaf}")
VIT = [
    *(
        Rule(
            f"blocks.{{i}}.{theirs}.{{leaf}}",
            f"blocks.{{i}}.{ours}.{{leaf}}",
            *([INTERLEAVED] if ours == "attn.qkv" else []),
        )
        for theirs, ours in BLOCK.items()
    ),
    *(Rule(name, name) for name in EQUAL),
]


def _pretraining() -> Layout:
    rules = [Rule("predictor.{rest}", "student.predictor.{rest}")]
    for branch, theirs in BRANCHES.items():
        rules += under(f"{theirs}.", f"{branch}.encoder.", VIT)
        rules += [Rule(f"{theirs}.head.{{rest}}", f"{branch}.projector.{{rest}}")]
    marks = tuple(f"{theirs}.blocks.{{i}}.self_attention.{{rest}}" for theirs in BRANCHES.values())
    order = (*(f"{theirs}." for theirs in BRANCHES.values()), "predictor.")
    return Layout(
        "MoCo v3 pretraining", "pretraining", Table(*rules), marks, ("moco_v3",), "vit", order=order
    )


CLASSIFIER = Layout(
    "a ViT classifier",
    "classifier",
    Table(*under("", STUDENT, VIT), Rule("head.{leaf}", "student.classifier.{leaf}")),
    ("head.{leaf}",),
    SUPERVISED,
    "vit",
)
ENCODER = Layout(
    "a ViT encoder",
    "encoder",
    Table(*under("", STUDENT, VIT)),
    ("blocks.{i}.self_attention.{rest}",),
    encoder="vit",
)


FROZEN = ("momentum_encoder.{rest}", "base_encoder.pos_embed", "base_encoder.patch_embed.{rest}")
"""Templates of what has no number."""


def groups(params: Sequence[Parameter]) -> list[list[Parameter]]:
    """With decay, and without."""
    trained = [p for p in params if not any(fits(template, p.name) for template in FROZEN)]
    decayed = [param for param in trained if len(param.shape) > 1]
    return [decayed, [param for param in trained if len(param.shape) == 1]]


def options(spec: RunSpec, group: int) -> dict[str, Node]:
    """The hyper-parameters of a group."""
    found = torch_options(spec, group)
    if group == 1:
        found["weight_decay"] = 0.0
    more = {"initial_lr": found["lr"], "do_bias_correction": True, "fused": False}
    return {"_options": {**found, **more}, "_enable_clip_grad": False}


MOMENTS = Moments({"adamw": KINDS["adamw"]}, groups=groups, step="shared", options=options)


def output(output: Output) -> tuple[str, Node]:
    """A run folder. LiBai names a folder of weights by the number of the last step, from 0 on."""
    parts: dict[str, Node] = {"model": output.tensors}
    if output.optimizer:
        parts["optimizer"] = optimizer_state(MOMENTS, output)
    last = max((output.step or 0) - 1, 0)
    return "libai", {f"model_{last:07d}": parts}


NAMES = {
    "first norm": "blocks.{i}.input_layernorm",
    "query, key, value": "blocks.{i}.self_attention.query_key_value",
    "attention": "blocks.{i}.self_attention.dense",
    "second norm": "blocks.{i}.post_attention_layernorm",
    "hidden": "blocks.{i}.mlp.dense_h_to_4h",
    "output": "blocks.{i}.mlp.dense_4h_to_h",
}
"""Names of the parts of a ViT in its forward pass."""

FORMAT = Format(
    name="libai",
    about="LiBai (Oneflow-Inc/libai)",
    layouts=(_pretraining(), CLASSIFIER, ENCODER),
    keys=frozenset({"model", "optimizer", "lr_scheduler"}),
    constants={"model.layer_norm_eps": 1e-5},
    moments=MOMENTS,
    arithmetic=(
        Vit({b: f"{name}." for b, name in BRANCHES.items()}, NAMES, qkv="interleaved"),
        Vit(names=NAMES, qkv="interleaved"),
    ),
    output=output,
)
