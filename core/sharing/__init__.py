"""Models for others: ONNX files, and folders of the Hugging Face Hub."""

from triptych.core.sharing.exporting import Export, export
from triptych.core.sharing.pushing import model_card, push

__all__ = ["Export", "export", "model_card", "push"]
