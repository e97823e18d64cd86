"""The conversion of foreign checkpoint names and layouts to canonical ones."""

from triptych.core.formats.loading import FORMATS, load_weights, read_arrays

__all__ = ["FORMATS", "load_weights", "read_arrays"]
