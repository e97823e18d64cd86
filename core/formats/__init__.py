"""Somebody else's names and layouts, and how they become canonical."""

from triptych.core.formats.loading import FORMATS, load_weights, read_arrays

__all__ = ["FORMATS", "load_weights", "read_arrays"]
