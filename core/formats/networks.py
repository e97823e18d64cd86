"""The rules of encoders that many formats share: the names of timm and torchvision.

Canonical names are these names, so a format adds prefixes and says what it spells otherwise.
"""

from triptych.core.formats.changes import SAME, Change
from triptych.core.formats.rules import Rule

LINEARS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
"""Linear layers of a block of a ViT."""
NORMS = ("norm1", "norm2")
"""Norms of a block of a ViT."""

PADDLE_FACTS = {
    "method.teacher_statistics": "averaged",
    "batch_norm.running_variance": "biased",
}
"""What Paddle's batch norms do to their statistics, which are parameters of the model there."""
PADDLE_CPU = (
    "batch_norm.running_variance: biased, as Paddle's kernels for CPUs compute it; its GPU kernels "
    "compute the unbiased one, and no file says which was used"
)


def vit(linear: Change = SAME) -> list[Rule]:
    """The rules of a ViT under timm's names.

    Args:
        linear: of the matrices.
    """
    weights = [f"blocks.{{i}}.{layer}.weight" for layer in LINEARS]
    return [
        *(Rule(name, name, linear) for name in weights),
        *_equal("cls_token", "pos_embed", "patch_embed.{rest}", "norm.{leaf}", "fc_norm.{leaf}"),
        *_equal(*(f"blocks.{{i}}.{layer}.{{leaf}}" for layer in (*NORMS, *LINEARS))),
    ]


def resnet() -> list[Rule]:
    """The rules of a ResNet under torchvision's names."""
    return _equal("conv1.weight", "bn1.{leaf}", "layer{i}.{rest}")


def _equal(*templates: str) -> list[Rule]:
    return [Rule(template, template) for template in templates]
