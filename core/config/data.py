"""The ``data`` section: where images come from."""

from collections.abc import Iterator
from typing import Literal

from triptych.core.config.fields import (
    Channels,
    KeyedError,
    NonNegativeInt,
    PositiveInt,
    Section,
    SixteenBits,
    Str,
)


class DataSpec(Section):
    """Where images come from."""

    name: Literal["digits", "image_folder", "image_list", "cifar10"] = "digits"
    """digits: scikit-learn's, embedded. image_folder: any folder of images, with or without one
    sub-folder per class. image_list: CSV or text, one path (and label) per line. cifar10: its own
    files, python or binary version."""
    root: Str | None = None
    """Folder of the images; paths in a list are relative to it."""
    list: Str | None = None
    """image_list only: the CSV or text file."""
    eval_root: Str | None = None
    """image_folder: folder of the held-out images for k-NN; default: no evaluation split."""
    channels: Channels = 3
    """Channels given to the model: 1 grey, 2 grey+alpha, 3 RGB, 4 RGBA."""
    bits: Literal["stated"] | SixteenBits = "stated"
    """Bits that 16-bit samples use, 8 to 16, counted from the lowest: their upper 8 are kept, and
    12 is right for values up to 4095. stated: what the file says of itself (TIFF BitsPerSample or
    MaxSampleValue, PNG sBIT), else all 16."""
    orientation: Literal["stored", "upright"] = "stored"
    """stored: pixels as they lie in the file, as ImageNet recipes take them, in every format.
    upright: turned and mirrored as the file's orientation tag (EXIF, XMP, TIFF) says."""
    max_pixels: PositiveInt = 10**9
    """Largest image that is read, width times height; also the most bytes of text or colour
    profile in a PNG file. A guard against small files that unpack to fill the memory."""
    workers: NonNegativeInt = 0
    """Worker processes; 0 loads in the training process. Never changes a pixel."""
    prefetch: PositiveInt = 2
    """Batches kept ready per worker; fewer where they would fill half of the free memory."""
    on_error: Literal["stop", "skip"] = "stop"
    """A damaged file: stop names it and ends the run; skip names it, counts it and takes the next
    sample of the epoch's order in its place."""

    def contradictions(self) -> Iterator[KeyedError]:
        """A dataset without its place."""
        if self.name in ("image_folder", "cifar10") and self.root is None:
            yield KeyedError(
                "root", f"data.name {self.name} needs data.root, the folder of the data"
            )
        if self.name == "image_list" and self.list is None:
            yield KeyedError("list", "data.name image_list needs data.list, the CSV or text file")
