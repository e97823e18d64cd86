"""timm's vision transformers, and the encoders that other tools write under their names."""

from triptych.core.formats.format import Format
from triptych.core.formats.single import VIT_CLASSIFIER, VIT_ENCODER

FORMAT = Format(
    name="timm",
    about="timm (huggingface/pytorch-image-models)",
    layouts=(VIT_CLASSIFIER, VIT_ENCODER),
    keys=frozenset({"state_dict", "state_dict_ema", "args", "version", "metric", "amp_scaler"}),
    constants={"model.layer_norm_eps": 1e-6},
)
