"""Specs and image folders for the tests of the data path."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from triptych.core.config.spec import RunSpec
from triptych.core.data import open_train
from triptych.core.data.source import Source
from triptych.core.errors import UserError
from triptych.core.random import stream

VIEW = [
    {"op": "random_resized_crop", "scale": [0.3, 1.0]},
    {"op": "color_jitter", "p": 0.8, "brightness": 0.4, "contrast": 0.4, "hue": 0.1},
    {"op": "gaussian_blur", "p": 0.5},
    {"op": "horizontal_flip", "p": 0.5},
]


def make_spec(
    data: dict[str, Any] | None = None,
    *,
    batch_size: int = 5,
    size: int | tuple[int, int] = 16,
    seed: int = 3,
    eval_resize: float = 1.0,
) -> RunSpec:
    """A small run; ``data`` is its data section."""
    data = data or {"name": "digits", "channels": 1}
    channels = data.get("channels", 3)
    return RunSpec.model_validate(
        {
            "seed": seed,
            "data": data,
            "augment": {
                "view1": VIEW,
                "view2": VIEW[:2],
                "mean": [0.4],
                "std": [0.3],
                "eval_resize": eval_resize,
            },
            "model": {
                "name": "vit",
                "width": 16,
                "depth": 1,
                "heads": 2,
                "patch_size": 4,
                "image_size": size,
                "channels": channels,
            },
            "method": {"name": "moco_v3"},
            "train": {"steps": 100, "batch_size": batch_size},
        }
    )


def write_images(root: Path, names: list[str], mode: str = "RGB") -> None:
    """One small, smooth picture per name, each different; the format follows the extension."""
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = stream(0, "test/image", number).integers(0, 256, (5, 4, 3), np.uint8)
        Image.fromarray(coarse).convert(mode).resize((40 + number, 50)).save(path)


def folder_spec(root: str | os.PathLike[str], **data: Any) -> RunSpec:
    """A run on an image folder; keywords are keys of ``data``."""
    return make_spec({"name": "image_folder", "root": str(root), **data})


def keys(source: Source) -> list[str]:
    return [source.key(index) for index in range(len(source))]


def labels(source: Source) -> list[int]:
    return [source.label(index) for index in range(len(source))]


def complaint(data: dict[str, Any], which: Any = open_train) -> str:
    with pytest.raises(UserError) as caught:
        which(make_spec(data))
    message = str(caught.value)
    assert "\n" not in message
    return message


def bad_exif(path: Path, seed: int = 0) -> None:
    """A sound JPEG file whose EXIF data names more tags than there are, so that Pillow warns."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 1, "maker of cameras"
    pixels = stream(0, "test/image", seed).integers(0, 256, (12, 16, 3), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, exif=exif)
    content = bytearray(path.read_bytes())
    place = content.index(b"Exif\0\0")
    content[place + 14 : place + 16] = b"\xff\x10"
    path.write_bytes(content)


class Huge:
    """A source of ten images, of which number 7 is too large for the memory."""

    classes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return 10

    def image(self, index: int) -> Image.Image:
        if index == 7:
            raise MemoryError
        return Image.new("RGB", (20, 20))

    def label(self, index: int) -> int:
        return -1

    def name(self, index: int) -> str:
        return f"huge[{index}]"

    key = name
