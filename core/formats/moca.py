"""The names of the official MOCA release (valeoai/MOCA).

Both encoders have timm's names, as the canonical ones do. Values and layouts are equal to ours,
with two exceptions in the codebook: the pointer is a vector of length 1, and the number of updates
is a float.
"""

from collections.abc import Collection

import numpy as np

from triptych.core.config.spec import MocaSpec, RunSpec
from triptych.core.contracts import State
from triptych.core.errors import UserError
from triptych.core.formats.encoders import Encoders
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
"""Maps prefixes of canonical names to prefixes of official names.

The first prefix that fits a name counts, so ``memory.distance_used`` precedes
``memory.distance``."""
PREDICTOR = {
    "scale": "scale",
    "hidden": "layers_w.0.generator.b0_fc",
    "norm": "layers_w.0.generator.b0_bn",
    "last": "layers_w.0.generator.b0_last_layer",
    "skip": "layers_w.0.skip",
}
"""Maps canonical to official names of the layers inside a predictor."""
for _ours, _theirs in (("image_predictor", "encoder_pred"), ("dense_predictor", "decoder_pred")):
    PREFIXES.update({f"student.{_ours}.{k}": f"{_theirs}.{v}" for k, v in PREDICTOR.items()})
ENCODERS = Encoders(
    {branch: PREFIXES[f"{branch}.encoder."] for branch in ("student", "teacher")},
    heads=("head.",),
    others=(
        *("encoder_pred.", "decoder_pred.", "bow_extractor."),
        *(official for ours, official in PREFIXES.items() if ours.startswith("student.decoder.")),
    ),
)


def matches(names: Collection[str]) -> bool:
    """Whether the names of a file are official ones."""
    return any(name.removeprefix(WRAPPER).startswith("encoder_teacher.") for name in names)


def names(spec: RunSpec) -> dict[str, str]:
    """The official name of each tensor, by canonical name.

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
    """Renames arrays with official names. The others keep theirs, and are reported as unused."""
    canonical = {official: name for name, official in names(spec).items()}
    state = {canonical.get(name, name): array for name, array in unwrapped(arrays).items()}
    for name in ("memory.pointer", "memory.updates"):
        if name in state and state[name].shape == (1,):
            count = state[name].reshape(())
            # The official number of updates is a float. ``checks`` refuses a fraction later.
            state[name] = count.astype(np.int64) if float(count).is_integer() else count
    return state


def from_canonical(state: State, spec: RunSpec) -> State:
    """The official state dict, without wrapper prefix and without the optimizer's entries.

    Raises:
        KeyError: the state lacks a tensor of the model.
    """
    arrays = {official: state[name] for name, official in names(spec).items()}
    pointer, updates = (PREFIXES[f"memory.{name}"] for name in ("pointer", "updates"))
    arrays[pointer] = np.reshape(arrays[pointer], 1)
    arrays[updates] = np.reshape(arrays[updates], 1).astype(np.float32)
    return arrays
