"""The rules of encoders that many formats share: the names of timm and torchvision.

Canonical names are these names, so a format adds prefixes and says what it spells otherwise.
"""

from collections.abc import Sequence

from triptych.core.formats.changes import SAME, Change
from triptych.core.formats.rules import Rule

LINEARS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
"""Names of the matrices in a block of a ViT."""

STATISTICS = {"running_mean": "_mean", "running_var": "_variance"}
"""Paddle's names of the statistics of a batch norm, by canonical name."""

COUNTER = "num_batches_tracked"
"""Number of batches that a batch norm has seen. Paddle has none."""


def vit(linear: Change = SAME, qkv: Change = SAME) -> list[Rule]:
    """The rules of a ViT under timm's names.

    Args:
        linear: of the matrices, except that of query, key and value.
        qkv: of weight and bias of query, key and value together.
    """
    special = [Rule(f"blocks.{{i}}.attn.qkv.{leaf}", f"blocks.{{i}}.attn.qkv.{leaf}", qkv)
               for leaf in ("weight", "bias") if qkv is not SAME]  # fmt: skip
    special += [
        Rule(f"blocks.{{i}}.{name}.weight", f"blocks.{{i}}.{name}.weight", linear)
        for name in LINEARS
        if linear is not SAME
    ]
    return [*special, *_equal("cls_token", "pos_embed", "patch_embed.{rest}", "blocks.{i}.{rest}"),
            *_equal("norm.{leaf}", "fc_norm.{leaf}")]  # fmt: skip


def resnet() -> list[Rule]:
    """The rules of a ResNet under torchvision's names."""
    return _equal("conv1.weight", "bn1.{leaf}", "layer{i}.{rest}")


def paddle_norms(rules: Sequence[Rule]) -> list[Rule]:
    """Rules of equal names, preceded by those for Paddle's names of the statistics.

    Args:
        rules: of any modules. A rule that ends in a field gets a twin for each statistic.
    """
    twins = []
    for rule in rules:
        source, target = rule.sources[0], rule.ours
        field = next((f for f in ("{leaf}", "{rest}") if target.endswith(f)), "")
        if field and source.endswith(field):
            start, end = source.removesuffix(field), target.removesuffix(field)
            inner = "{rest}." if field == "{rest}" else ""
            twins += [
                Rule(f"{start}{inner}{theirs}", f"{end}{inner}{ours}")
                for ours, theirs in STATISTICS.items()
            ]
    return [*twins, *rules]


def _equal(*templates: str) -> list[Rule]:
    return [Rule(template, template) for template in templates]
