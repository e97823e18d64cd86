"""The names of the official MOCA release (valeoai/MOCA).

Its encoders' tensors are timm's, as ours are. Values and layouts are equal, but for the codebook's
counts: the pointer is a vector of one there, the number of updates a float.
"""

from collections.abc import Collection

import numpy as np

from triptych.core.config.spec import MocaSpec, RunSpec
from triptych.core.contracts import State
from triptych.core.errors import UserError
from triptych.core.formats.wrapper import WRAPPER, unwrapped
from triptych.core.parameters import table

CODEBOOK = "bow_extractor.bow_extractor.0."
PREFIXES = {
    "student.encoder.": "encoder.",
    "teacher.encoder.": "encoder_teacher.",
    "student.decoder.mask_token": "mask_token_cls_pt",
    "student.decoder.pos_embed": "decoder_pos_embed",
    "student.decoder.early_norm.": "norm_cls_pt.",
    "student.decoder.embed.": "decoder_embed_cls_pt.",
    "student.decoder.blocks.": "decoder_blocks_cls_pt.",
    "student.decoder.norm.": "decoder_norm_cls_pt.",
    "memory.words": f"{CODEBOOK}_embedding",
    "memory.pointer": f"{CODEBOOK}_embedding_ptr",
    "memory.updates": f"{CODEBOOK}_track_num_batches",
    "memory.distance_used": f"{CODEBOOK}_dist_norm_prev",
    "memory.distance": f"{CODEBOOK}_dist_norm",
}
"""How canonical names begin -> how official ones do."""
PREDICTOR = {
    "scale": "scale",
    "hidden": "layers_w.0.generator.b0_fc",
    "norm": "layers_w.0.generator.b0_bn",
    "last": "layers_w.0.generator.b0_last_layer",
    "skip": "layers_w.0.skip",
}
"""The same inside a predictor."""
for _own, _theirs in (("image_predictor", "encoder_pred"), ("dense_predictor", "decoder_pred")):
    PREFIXES.update({f"student.{_own}.{k}": f"{_theirs}.{v}" for k, v in PREDICTOR.items()})


def matches(names: Collection[str]) -> bool:
    """Whether the names of a file are official ones."""
    return any(name.removeprefix(WRAPPER).startswith("encoder_teacher.") for name in names)


def names(spec: RunSpec) -> dict[str, str]:
    """Canonical -> official name of each tensor.

    Raises:
        UserError: the method is not MOCA.
    """
    if not isinstance(spec.method, MocaSpec):
        raise UserError(f"method.name: {spec.method.name}: official MOCA names need moca")
    renamed = {}
    for param in table(spec):
        prefix = next(p for p in PREFIXES if param.name.startswith(p))
        renamed[param.name] = PREFIXES[prefix] + param.name.removeprefix(prefix)
    return renamed


def to_canonical(arrays: State, spec: RunSpec) -> State:
    """Renames what has an official name; anything else keeps its own, to be reported as unused."""
    canonical = {official: name for name, official in names(spec).items()}
    found = {canonical.get(name, name): array for name, array in unwrapped(arrays).items()}
    for name in ("memory.pointer", "memory.updates"):
        if name in found and found[name].shape == (1,):
            count = found[name].reshape(())
            # The updates are a float there; what is no whole number is refused later.
            found[name] = count.astype(np.int64) if float(count).is_integer() else count
    return found


def from_canonical(state: State, spec: RunSpec) -> State:
    """The official state dict, unwrapped. Optimizer entries have no place in it.

    Raises:
        KeyError: a tensor of the model is not in the state.
    """
    found = {official: state[name] for name, official in names(spec).items()}
    pointer, updates = (PREFIXES[f"memory.{name}"] for name in ("pointer", "updates"))
    found[pointer] = np.reshape(found[pointer], 1)
    found[updates] = np.reshape(found[updates], 1).astype(np.float32)
    return found
