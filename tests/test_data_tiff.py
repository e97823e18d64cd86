"""Bands: four stay four, two stay two, in every container, and five are refused."""

import zlib
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from support.data_specs import folder_spec
from support.tiff import GREY, RGB, write_tiff

from triptych.core.data import DamagedImage, open_train
from triptych.core.data.decode import Decoding, decode
from triptych.core.data.planes import tiff

FOUR, TWO = Decoding("RGBA"), Decoding("LA")


def bands(count: int, dtype: type = np.uint8) -> np.ndarray:
    values = np.random.default_rng(count).integers(0, 2**16, (6, 5, count), dtype=np.uint16)
    values[0, 0, -1] = 0  # where alpha is zero, dividing by it loses the most
    return values if dtype is np.uint16 else (values >> 8).astype(np.uint8)


@pytest.mark.parametrize("extra", [(), (0,), (1,), (2,)])
@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_four_bands_of_a_tiff_are_as_stored(tmp_path, extra, separate, order, dtype):
    stored = bands(4, dtype)
    write_tiff(tmp_path / "x.tif", stored, extra=extra, separate=separate, order=order)
    found = np.asarray(decode(str(tmp_path / "x.tif"), FOUR))
    assert np.array_equal(found, stored >> 8 if dtype is np.uint16 else stored)


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("count", [2, 3, 4])
def test_bands_without_colour_are_bands(tmp_path, count, separate):
    stored = bands(count)
    zeros = (0,) * (count - 1)
    write_tiff(tmp_path / "x.tif", stored, extra=zeros, photometric=GREY, separate=separate)
    how = {2: TWO, 3: Decoding("RGB"), 4: FOUR}[count]
    assert np.array_equal(np.asarray(decode(str(tmp_path / "x.tif"), how)), stored)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("extra", [(0,), (1,), (2,)])
def test_two_bands_of_sixteen_bits_are_read(tmp_path, extra, order):
    stored = bands(2, np.uint16)
    write_tiff(tmp_path / "x.tif", stored, extra=extra, photometric=GREY, order=order)
    found = np.asarray(decode(str(tmp_path / "x.tif"), TWO))
    assert np.array_equal(found, stored >> 8)


def test_a_compressed_tiff_with_a_fourth_band(tmp_path):
    stored = bands(4)
    for mode in ("RGBA", "RGBX", "CMYK"):
        image = Image.frombytes(mode, (5, 6), stored.tobytes())
        image.save(tmp_path / "x.tif", compression="tiff_lzw")
        assert np.array_equal(np.asarray(decode(str(tmp_path / "x.tif"), FOUR)), stored), mode


@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("count, extra", [(2, 0), (3, 0), (4, 0), (4, 1), (4, 2)])
def test_compressed_planes_are_as_stored(tmp_path, count, extra, dtype, tiled):
    stored = bands(count, dtype)
    planes = np.moveaxis(stored, -1, 0)
    data = [zlib.compress(plane.tobytes()) for plane in planes]
    if tiled:
        data = [zlib.compress(np.pad(plane, ((0, 10), (0, 11))).tobytes()) for plane in planes]
    ends = np.cumsum([8, *map(len, data)])
    sizes = {322: [16], 323: [16]} if tiled else {278: [6]}
    at, lengths = (324, 325) if tiled else (273, 279)
    entries = {
        **{256: [5], 257: [6], 258: [8 * stored.itemsize] * count, 259: [8], 262: [1]},
        **{277: [count], 284: [2], 338: [extra] * (count - 1), **sizes},
        **{at: [*map(int, ends[:-1])], lengths: [*map(len, data)]},
    }
    (tmp_path / "x.tif").write_bytes(tiff(bytes(8) + b"".join(data), "<", entries))
    how = {2: TWO, 3: Decoding("RGB"), 4: FOUR}[count]
    found = np.asarray(decode(str(tmp_path / "x.tif"), how))
    assert np.array_equal(found, stored >> 8 if dtype is np.uint16 else stored)
    if dtype is np.uint16:
        found = np.asarray(decode(str(tmp_path / "x.tif"), replace(how, bits=12)))
        assert np.array_equal(found, np.minimum(stored >> 4, 255))


def test_planes_of_no_known_range_are_not_understood(tmp_path):
    entries = {
        **{256: [1], 257: [1], 258: [32] * 3, 259: [1], 262: [2], 277: [3], 278: [1], 284: [2]},
        **{339: [3] * 3, 273: [8, 12, 16], 279: [4, 4, 4]},
    }
    (tmp_path / "x.tif").write_bytes(tiff(bytes(20), "<", entries))
    with pytest.raises(DamagedImage, match=r"x\.tif: not an image that .* mode F"):
        decode(str(tmp_path / "x.tif"), FOUR)


@pytest.mark.parametrize("ending", ["png", "webp", "bmp", "tga", "jp2"])
def test_four_bands_of_other_formats_are_as_stored(tmp_path, ending):
    options = {"lossless": True, "exact": True} if ending == "webp" else {}
    Image.fromarray(bands(4)).save(tmp_path / f"x.{ending}", **options)
    assert np.array_equal(np.asarray(decode(str(tmp_path / f"x.{ending}"), FOUR)), bands(4))


@pytest.mark.parametrize("ending", ["png", "tif"])
def test_two_bands_are_as_stored(tmp_path, ending):
    Image.fromarray(bands(2)).save(tmp_path / f"x.{ending}")
    assert np.array_equal(np.asarray(decode(str(tmp_path / f"x.{ending}"), TWO)), bands(2))


@pytest.mark.parametrize("photometric", [GREY, RGB])
@pytest.mark.parametrize("count", [5, 6, 9])
def test_more_than_four_bands_are_refused_by_name(tmp_path, caplog, count, photometric):
    extra = (0,) * (count - 3 if photometric == RGB else count - 1)
    write_tiff(tmp_path / "x.tif", bands(count), extra=extra, photometric=photometric)
    with pytest.raises(DamagedImage, match=rf"x\.tif: {count} bands, .*data\.channels"):
        decode(str(tmp_path / "x.tif"), FOUR)
    assert not caplog.records


def test_colour_of_a_tiff_with_associated_alpha_is_divided_for_three_channels(tmp_path):
    stored = np.full((2, 2, 4), 64, np.uint8)
    stored[..., 3] = 128
    write_tiff(tmp_path / "x.tif", stored, extra=(1,))
    assert np.asarray(decode(str(tmp_path / "x.tif"), Decoding("RGB")))[0, 0].tolist() == [127] * 3


def test_the_number_of_channels_reaches_the_reader(tmp_path):
    write_tiff(tmp_path / "x.tif", bands(4), extra=(1,))
    image = open_train(folder_spec(tmp_path, channels=4)).image(0)
    assert np.array_equal(np.asarray(image), bands(4))
