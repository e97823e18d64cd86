"""The official MOCA release (valeoai/MOCA).

Both encoders have timm's names, as the canonical ones do. Values and layouts are equal to ours,
with two exceptions in the codebook: the pointer is a vector of length 1, and the number of updates
is a float.
"""

from triptych.core.files.tree import Content, Record
from triptych.core.formats.changes import VECTOR, Facts, Reshaped
from triptych.core.formats.format import Format, Layout
from triptych.core.formats.networks import vit
from triptych.core.formats.rules import Rule, Table, under
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
}
"""Keys of the spec, by the names of the program's arguments."""


def facts(content: Content) -> Facts:
    """What the stored arguments of the program say about the model."""
    arguments = content.tree.get("args") if isinstance(content.tree, dict) else None
    found = arguments if isinstance(arguments, Record) else {}
    return {key: found[name] for name, key in ARGUMENTS.items() if name in found}


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
        ),
        VIT_ENCODER,
        probe(VIT_CLASSIFIER),
    ),
    keys=frozenset({"model", "optimizer", "epoch", "args", "scaler"}),
    facts=facts,
    constants={"model.layer_norm_eps": 1e-6},
)
