"""One image file: what is read from it, and what is said of one that cannot be read."""

import os
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin
from support.data_specs import bad_exif, folder_spec, write_images

from triptych.core.data import DamagedImage, Pipeline, open_train
from triptych.core.data.decode import NOTES, Decoding, decode, to_mode
from triptych.core.data.planes import tiff

RGB = Decoding("RGB")
UPRIGHT = Decoding("RGB", orientation="upright")


def picture(seed: int = 0, size: tuple[int, int] = (16, 12)) -> Image.Image:
    shape = (size[1], size[0], 3)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


# ------------------------------------------------------------------------------------------- modes


def test_palettes_are_looked_up_with_their_transparency(tmp_path):
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.putdata([0, 1])
    palette.save(tmp_path / "x.png", transparency=bytes([0, 128]))
    path = str(tmp_path / "x.png")
    assert decode(path, Decoding("RGB")).tobytes() == bytes([10, 20, 30, 200, 100, 50])
    assert decode(path, Decoding("RGBA")).tobytes() == bytes([10, 20, 30, 0, 200, 100, 50, 128])
    assert decode(path, Decoding("LA")).tobytes()[1::2] == bytes([0, 128])


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA"])
@pytest.mark.parametrize("stored", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_every_common_mode_converts(stored, mode):
    image = Image.new("RGB", (6, 5), (200, 30, 90)).convert(stored)
    found = to_mode(image, Decoding(mode))
    assert found.mode == mode and found.size == (6, 5)
    if stored not in ("1", "L", "LA", "P") and mode == "RGB":
        assert np.abs(np.asarray(found, int) - [200, 30, 90]).max() <= 3


@pytest.mark.parametrize("stored", ["I", "F"])
def test_pixels_of_unknown_range_are_refused(tmp_path, stored):
    Image.new(stored, (4, 4), 70000).save(tmp_path / "x.tif")
    with pytest.raises(DamagedImage, match=r"x\.tif: .*32-bit"):
        decode(str(tmp_path / "x.tif"), Decoding("L"))


def test_every_cut_through_a_jpeg_is_damage(tmp_path):
    write_images(tmp_path, ["x.jpg"])
    path = tmp_path / "x.jpg"
    content = path.read_bytes()
    whole = decode(str(path), Decoding("RGB")).tobytes()
    for length in range(0, len(content), max(1, len(content) // 40)):
        path.write_bytes(content[:length])
        with pytest.raises(DamagedImage):
            decode(str(path), Decoding("RGB"))
    path.write_bytes(content)
    assert decode(str(path), Decoding("RGB")).tobytes() == whole


# ---------------------------------------------------------------------------------------- refusals


def test_a_pipe_among_the_images_is_named_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(DamagedImage, match=r"pipe\.jpg: not a regular file"):
        decode(str(tmp_path / "pipe.jpg"), RGB)


def test_a_name_cannot_begin_a_line_of_its_own(tmp_path):
    (tmp_path / "z\nerror: fake.jpg").write_text("no image")
    with pytest.raises(DamagedImage) as caught:
        decode(str(tmp_path / "z\nerror: fake.jpg"), RGB)
    assert "\n" not in str(caught.value) and "z\\nerror: fake.jpg" in str(caught.value)


def test_a_damaged_tiff_says_what_libtiff_says_and_prints_nothing(tmp_path, capfd):
    path = tmp_path / "x.tif"
    picture(size=(60, 50)).save(path, compression="tiff_adobe_deflate")
    content = bytearray(path.read_bytes())
    content[600:640] = bytes(40)
    path.write_bytes(content)
    with pytest.raises(DamagedImage, match=r"x\.tif: damaged image \(ZIPDecode: .*\); repair"):
        decode(str(path), RGB)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"no image", "not an image that Pillow [0-9.]+ understands; convert"),
        (b"II*\0" + bytes(40), "not an image that Pillow [0-9.]+ understands; convert"),
        (b"\x89HDF\r\n\x1a\n" + bytes(40), "an image that Pillow [0-9.]+ names and cannot read"),
        (b"", "damaged image .the file is empty."),
    ],
)
def test_what_is_not_understood_is_not_called_damaged(tmp_path, content, said):
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(DamagedImage, match=rf"x\.png: {said}.*data\.on_error: skip") as caught:
        decode(str(tmp_path / "x.png"), RGB)
    assert ("damaged" in str(caught.value)) == (not content)


def test_a_compression_that_libtiff_lacks_is_not_called_damage(tmp_path):
    """libtiff prints it; Pillow says only that its decoder has failed."""
    webp = 50001
    entries = {256: [4], 257: [4], 258: [8] * 3, 259: [webp], 262: [2], 273: [8], 277: [3]}
    content = tiff(bytes(56), "<", {**entries, 278: [4], 279: [48]})
    (tmp_path / "x.tif").write_bytes(content)
    with pytest.raises(DamagedImage, match=r"not an image that .* understands .*not configured"):
        decode(str(tmp_path / "x.tif"), RGB)


def test_a_file_that_is_not_there_is_not_called_damaged(tmp_path):
    with pytest.raises(DamagedImage, match=r"x\.png: cannot be read: No such file") as caught:
        decode(str(tmp_path / "x.png"), RGB)
    assert "damaged" not in str(caught.value)


# ------------------------------------------------------------------------------------------ limits


def large_profile(path: Path) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    picture().save(path, icc_profile=profile + bytes(1200 << 10))


def large_text(path: Path) -> None:
    notes = PngImagePlugin.PngInfo()
    notes.add_text("Comment", "a" * (1100 << 10), zip=True)
    picture().save(path, pnginfo=notes)


@pytest.mark.parametrize("write", [large_profile, large_text])
def test_notes_in_a_png_do_not_hide_its_pixels(tmp_path, write):
    write(tmp_path / "x.png")
    assert decode(str(tmp_path / "x.png"), RGB).tobytes() == picture().tobytes()
    with pytest.raises(DamagedImage, match=r"x\.png: .* data\.max_pixels, 1000 bytes; raise it"):
        decode(str(tmp_path / "x.png"), Decoding("RGB", max_pixels=1000))


@pytest.mark.parametrize("ending", ["png", "tif", "jpg", "webp"])
def test_the_limit_on_pixels_is_the_spec_s_alone(tmp_path, monkeypatch, ending):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    path = tmp_path / f"x.{ending}"
    picture().save(path)
    assert decode(str(path), Decoding("RGB", max_pixels=192)).size == (16, 12)
    assert Image.MAX_IMAGE_PIXELS == 20  # whatever else runs in this process keeps its own
    with pytest.raises(DamagedImage) as caught:
        decode(str(path), Decoding("RGB", max_pixels=191))
    assert str(caught.value) == (
        f"{path}: 192 pixels (16 x 12) are more than data.max_pixels, 191; raise it, or set "
        "data.on_error: skip"
    )


def test_the_keys_of_the_spec_reach_the_reader(tmp_path):
    write_images(tmp_path, ["x.png"])
    with pytest.raises(DamagedImage, match=r"data\.max_pixels, 5"):
        open_train(folder_spec(tmp_path, max_pixels=5)).image(0)


# ------------------------------------------------------------------------------------- orientation


@pytest.mark.parametrize("tag", range(1, 9))
@pytest.mark.parametrize("ending", ["jpg", "png", "tif", "webp", "avif"])
def test_the_orientation_tag_has_one_rule_for_all_formats(tmp_path, ending, tag):
    upright = Image.new("RGB", (32, 16))
    upright.paste((255, 255, 255), (0, 0, 8, 8))  # a bright corner, at the top left
    stored = stored_as(upright, tag)
    exif = Image.Exif()
    exif[0x0112] = tag
    path = tmp_path / f"x.{ending}"
    stored.save(path, exif=exif, quality=95)
    for how, wanted in ((RGB, stored), (UPRIGHT, upright)):
        found = decode(str(path), how)
        assert found.size == wanted.size
        assert np.abs(np.asarray(found, int) - np.asarray(wanted)).max() < 60  # lossy ones ring


def stored_as(upright: Image.Image, tag: int) -> Image.Image:
    """Exif names the sides of the upright image at which the first row and column lie."""
    rows = np.asarray(upright)
    if tag in (3, 4, 6, 7):  # first row at the bottom, or first column at the right ...
        rows = rows[::-1] if tag in (3, 4) else rows[:, ::-1]
    if tag in (2, 3):
        rows = rows[:, ::-1]
    if tag in (7, 8):
        rows = rows[::-1]
    if tag > 4:  # rows and columns are exchanged
        rows = rows.transpose(1, 0, 2)
    return Image.fromarray(np.ascontiguousarray(rows))


def test_a_compressed_tiff_follows_the_rule_too(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture().save(tmp_path / "x.tif", exif=exif, compression="tiff_lzw")
    assert decode(str(tmp_path / "x.tif"), RGB).tobytes() == picture().tobytes()
    assert decode(str(tmp_path / "x.tif"), UPRIGHT).size == (12, 16)


# ---------------------------------------------------------------------------------------- warnings


def test_what_a_library_warns_of_is_a_note_of_the_image(tmp_path, recwarn, capfd):
    bad_exif(tmp_path / "x.jpg")
    (note,) = decode(str(tmp_path / "x.jpg"), RGB).info[NOTES]
    assert "EXIF" in note
    assert not recwarn.list and capfd.readouterr().err == ""


def test_a_sound_image_has_no_notes(tmp_path):
    picture().save(tmp_path / "x.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not decode(str(tmp_path / "x.png"), RGB).info


def test_what_libtiff_prints_is_a_note_too(tmp_path, capfd):
    path = tmp_path / "x.tif"
    picture(size=(60, 50)).convert("1").save(path, compression="group4")
    content = bytearray(path.read_bytes())
    content[20:23] = b"\x00\x01\x02"
    path.write_bytes(content)
    assert any("Fax" in note for note in decode(str(path), RGB).info[NOTES])
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("workers", [0, 2])
def test_each_file_is_warned_of_once(tmp_path, capfd, workers):
    for number in range(4):
        bad_exif(tmp_path / f"{number}.jpg", number)
    picture(9).save(tmp_path / "sound.jpg")
    spec = folder_spec(tmp_path, workers=workers)
    with Pipeline(spec, open_train(spec)) as pipeline:
        list(pipeline.batches(0, 3))
        named = pipeline.warned
    assert sorted(name for name, _ in named) == [str(tmp_path / f"{n}.jpg") for n in range(4)]
    assert capfd.readouterr().err == ""
