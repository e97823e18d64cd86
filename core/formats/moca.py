"""The official MOCA release (valeoai/MOCA).

Both encoders have timm's names, as the canonical ones do. Values and layouts are equal to ours,
with two exceptions in the codebook: the pointer is a vector of length 1, and the number of updates
is a float. The optimizer has four groups, and numbers only what is trained, group by group.
"""

from collections.abc import Sequence

from triptych.core.config.spec import AdamWSpec, RunSpec
from triptych.core.files.tree import Content, Node, Record
from triptych.core.formats.arithmetic import Vit
from triptych.core.formats.changes import VECTOR, Facts, Reshaped
from triptych.core.formats.envelopes import loss_scale, scaler
from triptych.core.formats.format import Format, Layout, Output, epochs
from triptych.core.formats.moments import KINDS, Moments, Parameter, torch_options
from triptych.core.formats.networks import vit
from triptych.core.formats.optimizers import optimizer_state
from triptych.core.formats.rules import Rule, Table, fits, under
from triptych.core.formats.single import VIT_CLASSIFIER, VIT_ENCODER, probe

BRANCHES = {"student": "encoder", "teacher": "encoder_teacher"}
"""Official prefixes, by canonical one."""
CODEBOOK = "bow_extractor.bow_extractor.0._"
COUNT = Reshaped((1,), "float32")
GENERATOR = {
    "scale": "scale",
    "hidden": "layers_w.0.generator.b0_fc",
    "norm": "layers_w.0.generator.b0_bn",
    "last": "layers_w.0.generator.b0_last_layer",
    "skip": "layers_w.0.skip",
}
"""Official names of the layers inside a predictor, by canonical name."""
PREDICTORS = {"image_predictor": "encoder_pred", "dense_predictor": "decoder_pred"}


def _table() -> Table:
    rules = [
        Rule(f"{CODEBOOK}embedding", "memory.words"),
        Rule(f"{CODEBOOK}embedding_ptr", "memory.pointer", VECTOR),
        Rule(f"{CODEBOOK}track_num_batches", "memory.updates", COUNT),
        Rule(f"{CODEBOOK}dist_norm", "memory.distance"),
        Rule(f"{CODEBOOK}dist_norm_prev", "memory.distance_used"),
        Rule("mask_token_cls_pt", "student.decoder.mask_token"),
        Rule("decoder_pos_embed", "student.decoder.pos_embed"),
        Rule("norm_cls_pt.{leaf}", "student.decoder.early_norm.{leaf}"),
        Rule("decoder_embed_cls_pt.{leaf}", "student.decoder.embed.{leaf}"),
        Rule("decoder_blocks_cls_pt.{rest}", "student.decoder.blocks.{rest}"),
        Rule("decoder_norm_cls_pt.{leaf}", "student.decoder.norm.{leaf}"),
    ]
    for branch, official in BRANCHES.items():
        rules += under(f"{official}.", f"{branch}.encoder.", vit())
    for ours, theirs in PREDICTORS.items():
        rules += [Rule(f"{theirs}.scale", f"student.{ours}.scale")]
        rules += [
            Rule(f"{theirs}.{layer}.{{leaf}}", f"student.{ours}.{name}.{{leaf}}")
            for name, layer in GENERATOR.items()
        ]
    return Table(*rules)


ORDER = (
    "decoder_pos_embed",
    "mask_token_cls_pt",
    "encoder.",
    "encoder_pred.",
    "encoder_teacher.",
    "bow_extractor.",
    "norm_cls_pt.",
    "decoder_embed_cls_pt.",
    "decoder_blocks_cls_pt.",
    "decoder_norm_cls_pt.",
    "decoder_pred.",
)
"""The order of the modules in the model."""
FROZEN = ("encoder_teacher.{rest}", "encoder.pos_embed", "decoder_pos_embed", "{leaf}.scale")
"""Templates of what is not trained."""


def groups(params: Sequence[Parameter]) -> list[list[Parameter]]:
    """Without and with decay; then those of the weight generators, without and with decay."""
    found: list[list[Parameter]] = [[], [], [], []]
    for param in params:
        if not any(fits(template, param.name) for template in FROZEN):
            generator = ".layers_w." in param.name
            decayed = len(param.shape) > 1 and not param.name.endswith(".bias")
            found[2 * generator + decayed].append(param)
    return found


def options(spec: RunSpec, group: int) -> dict[str, Node]:
    """The hyper-parameters of a group."""
    values = torch_options(spec, group)
    generator, decayed = group >= 2, group % 2 == 1
    optim = spec.optim
    if generator and isinstance(optim, AdamWSpec) and optim.generator_lr is not None:
        values["lr"] = optim.generator_lr
    if not decayed:
        values["weight_decay"] = 0.0
    return {"is_wgen": generator, "use_wd": decayed, **values}


MOMENTS = Moments({"adamw": KINDS["adamw"]}, groups=groups, options=options, scale=loss_scale)

ARGUMENTS = {
    "kappa": "method.kappa",
    "inv_delta": "method.inverse_delta",
    "num_new_words": "method.new_words",
    "early_layer": "method.early_layer",
    "pred_mlp_ratio": "method.predictor_ratio",
    "img_weight": "method.image_weight",
    "loc_weight": "method.dense_weight",
    "mask_ratio": "method.mask_ratios",
    "dec_mask_ratio": "method.decoder_ratios",
    "weight_decay": "optim.weight_decay",
    "lr_wgen": "optim.generator_lr",
    "clip_grad": "optim.clip_norm",
}
"""Keys of the spec, by the names of the program's arguments."""


def facts(content: Content) -> Facts:
    """What the stored arguments of the program say about the model."""
    arguments = content.tree.get("args") if isinstance(content.tree, dict) else None
    found = arguments if isinstance(arguments, Record) else {}
    facts = {key: found[name] for name, key in ARGUMENTS.items() if name in found}
    if "avg_pooling" in found:
        facts["method.pooling"] = "mean" if found["avg_pooling"] else "cls"
    return facts


def finished(content: Content) -> int | None:
    """The number of whole epochs. The entry is that of the last one, counted from 0."""
    last = epochs(content)
    return None if last is None else last + 1


def output(output: Output) -> tuple[str, Node]:
    """A checkpoint as the program writes it, without its arguments."""
    last = max(output.epoch - 1, 0)
    tree: dict[str, Node] = {"model": output.tensors, "epoch": last}
    if output.optimizer:
        tree["optimizer"] = optimizer_state(MOMENTS, output)
        tree["scaler"] = scaler(output)
    return "torch", tree


FORMAT = Format(
    name="moca",
    about="MOCA (valeoai/MOCA)",
    layouts=(
        Layout(
            "MOCA pretraining",
            "pretraining",
            _table(),
            ("encoder_teacher.{rest}", "bow_extractor.{rest}"),
            ("moca",),
            "vit",
            beside=("head.{rest}", "encoder.head.{rest}", "encoder_teacher.head.{rest}"),
            order=ORDER,
        ),
        VIT_ENCODER,
        probe(VIT_CLASSIFIER),
    ),
    keys=frozenset({"model", "optimizer", "epoch", "args", "scaler"}),
    facts=facts,
    arithmetic=(Vit({b: f"{name}." for b, name in BRANCHES.items()}), Vit()),
    constants={"model.layer_norm_eps": 1e-6},
    moments=MOMENTS,
    epochs=finished,
    output=output,
)
