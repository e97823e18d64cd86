"""The conversion of foreign checkpoint names and layouts to canonical ones."""

from triptych.core.formats.detection import FORMATS
from triptych.core.formats.loading import load_weights, read_arrays
from triptych.core.formats.pretrained import initial_state, load_encoder

__all__ = ["FORMATS", "initial_state", "load_encoder", "load_weights", "read_arrays"]
