"""Image files that are no ordinary files, or large, or oddly named."""

import os

import pytest
from PIL import Image

from triptych.core.data import DamagedImage
from triptych.core.data.decode import decode


def test_a_pipe_among_the_images_is_named_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(DamagedImage, match=r"pipe\.jpg: damaged image \(not a regular file\)"):
        decode(str(tmp_path / "pipe.jpg"), "RGB")


def test_a_name_cannot_begin_a_line_of_its_own(tmp_path):
    (tmp_path / "z\nerror: fake.jpg").write_text("no image")
    with pytest.raises(DamagedImage) as caught:
        decode(str(tmp_path / "z\nerror: fake.jpg"), "RGB")
    assert "\n" not in str(caught.value) and "z\\nerror: fake.jpg" in str(caught.value)


def test_a_large_image_is_read_without_a_warning(tmp_path, recwarn, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 60)
    Image.new("L", (8, 8)).save(tmp_path / "large.png")
    assert decode(str(tmp_path / "large.png"), "L").size == (8, 8)
    assert not recwarn.list
