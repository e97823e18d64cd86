"""The ``data`` section: the source of the images."""

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
from triptych.core.config.lowshot import is_amount

WITHOUT_ROOT = ("digits", "image_list")
"""The names of sources that are not read from ``data.root``."""


class DataSpec(Section):
    """The source of the images."""

    name: Literal[
        "digits",
        "image_folder",
        "image_list",
        "cifar10",
        "cifar100",
        "idx",
        "stl10",
        "flowers102",
        "pets",
        "webdataset",
        "parquet",
    ] = "digits"
    """digits: the digits of scikit-learn, included in the program. image_folder: a folder of
    images, with or without one sub-folder per class. image_list: a CSV or text file with one path
    (and label) per line. The files as published of cifar10 and cifar100 (python or binary version),
    idx (MNIST, Fashion-MNIST, KMNIST; gzip or unpacked), stl10 (binary version), flowers102 (Oxford
    Flowers) and pets (Oxford-IIIT Pets). webdataset: tars, which are read where they are. parquet:
    files of images as Hugging Face publishes them; needs the extra triptych[parquet]."""
    root: Str | None = None
    """Folder of the images. Paths in a list are relative to it. For webdataset and parquet also a
    pattern such as `DIR/train-*.tar`."""
    list: Str | None = None
    """For image_list: the CSV or text file."""
    eval_list: Str | None = None
    """For image_list: the CSV or text file of the held-out images. null: no evaluation."""
    eval_root: Str | None = None
    """Folder or pattern of the held-out images, for image_folder, webdataset and parquet. null: no
    evaluation."""
    index: Str | None = "auto"
    """Folder of the index files, which remember the content of large image folders and tars. A
    change of the data is noticed. auto: triptych in the user's folder for caches. null: none."""
    class_names: Str | None = None
    """Names of the classes for reports and predictions: a text file with one name per line in the
    order of the classes, or with lines `CLASS NAME` such as `n01440764 tench`; or fashion_mnist, a
    table in the program. null: the data's own labels."""
    labels: Str | None = None
    """For cifar100: fine, the 100 classes (also null), or coarse, the 20 groups. For parquet: the
    column of the labels; null: label, labels or fine_label."""
    split: Literal["train", "unlabeled", "train+unlabeled"] = "train"
    """For stl10: the images to train on. Evaluation uses train and test in any case."""
    labelled: PositiveInt | Str | None = None
    """Number of images per class, or their share of each class like 1%, whose labels are used: by
    linear probe and fine-tuning, which train on these images only, and by evaluations, which learn
    from them. The run's seed draws them, as for low-shot. null: all."""
    channels: Channels = 3
    """Number of channels that the model gets: 1 grey, 2 grey+alpha, 3 RGB, 4 RGBA."""
    bits: Literal["stated"] | SixteenBits = "stated"
    """Number of low bits that 16-bit samples use, 8 to 16. The upper 8 of these bits are kept:
    12 fits values up to 4095. stated: the number that the file states (TIFF BitsPerSample or
    MaxSampleValue, PNG sBIT), or 16 if it states none."""
    orientation: Literal["stored", "upright"] = "stored"
    """stored: pixels as stored in the file, for every format, as in ImageNet recipes. upright:
    rotated and mirrored by the file's orientation tag (EXIF, XMP, TIFF)."""
    max_pixels: PositiveInt = 10**9
    """Largest image to read, width times height in pixels. It is also the limit, in bytes, of text
    or colour profile in a PNG file. The limit guards against small files that unpack to fill the
    memory."""
    workers: NonNegativeInt = 0
    """Number of worker processes; 0 loads in the training process. It never changes a pixel."""
    prefetch: PositiveInt = 2
    """Number of batches to prepare per worker; fewer if they would fill half of the free memory."""
    on_error: Literal["stop", "skip"] = "stop"
    """What happens at a damaged file. stop: names the file and ends the run. skip: names and counts
    the file, and replaces it by the next sample in the order of the epoch."""

    @property
    def held_out_key(self) -> str:
        """The key that names the held-out images of data that have none by themselves."""
        return "data.eval_list" if self.name == "image_list" else "data.eval_root"

    @property
    def lacks_held_out(self) -> bool:
        """Whether the data have held-out images only by a key, and that key is not set."""
        named = self.name in ("image_folder", "image_list", "webdataset", "parquet")
        return named and not (self.eval_list if self.name == "image_list" else self.eval_root)

    def contradictions(self) -> Iterator[KeyedError]:
        """Reports a missing folder or file, and keys of another kind of data."""
        if self.name not in WITHOUT_ROOT and self.root is None:
            yield KeyedError(
                "root", f"data.name {self.name} needs data.root, the folder of the data"
            )
        if self.name == "image_list" and self.list is None:
            yield KeyedError("list", "data.name image_list needs data.list, the CSV or text file")
        if self.name != "image_list" and self.eval_list is not None:
            yield KeyedError("eval_list", f"only image_list has lists, not {self.name}")
        if self.labels is not None and self.name not in ("cifar100", "parquet"):
            yield KeyedError(
                "labels", f"data.name {self.name} has no choice of labels; leave it out"
            )
        elif self.name == "cifar100" and self.labels not in (None, "fine", "coarse"):
            yield KeyedError("labels", "of cifar100: expected fine or coarse")
        if self.labelled is not None and not is_amount(self.labelled):
            yield KeyedError(
                "labelled", f"{self.labelled!a}: expected a number, or a share like 1%"
            )
        if self.split != "train" and self.name != "stl10":
            yield KeyedError("split", f"only stl10 has such a part, not {self.name}; leave it out")
