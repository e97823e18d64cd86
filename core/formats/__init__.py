"""The conversion of foreign checkpoint names and layouts to canonical ones."""

from triptych.core.formats.detection import FORMATS
from triptych.core.formats.loading import (
    load_training_state,
    load_weights,
    read_arrays,
    read_training,
)
from triptych.core.formats.opening import read_spec
from triptych.core.formats.pretrained import initial_state, load_encoder, load_encoders

__all__ = [
    "FORMATS",
    "initial_state",
    "load_encoder",
    "load_encoders",
    "load_training_state",
    "load_weights",
    "read_arrays",
    "read_spec",
    "read_training",
]
