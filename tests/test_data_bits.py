"""Samples of 16 bits and how they become 8."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.data_specs import folder_spec
from support.tiff import GREY, RGB, write_tiff

from triptych.core.data import open_train
from triptych.core.data.bits import USED
from triptych.core.data.decode import Decoding, decode
from triptych.core.data.levels import few_levels

RAMP = np.arange(4096, dtype=np.uint16).reshape(64, 64)
MAX_SAMPLE_VALUE = 281


def write_png(path: Path, values: np.ndarray, significant: int | None = None) -> None:
    """values: (H, W), (H, W, 2), (H, W, 3) or (H, W, 4) of 16 bits."""
    height, width = values.shape[:2]
    count = 1 if values.ndim == 2 else values.shape[2]
    colour = {1: 0, 2: 4, 3: 2, 4: 6}[count]
    rows = values.astype(">u2").reshape(height, -1)
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0))]
    if significant:
        chunks.append((b"sBIT", bytes([significant] * count)))
    chunks += [(b"IDAT", zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows)))]
    chunks += [(b"IEND", b"")]
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + b"".join(
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
            for kind, data in chunks
        )
    )


def read(path: Path, mode: str = "L", bits: int | None = None) -> np.ndarray:
    return np.asarray(decode(str(path), Decoding(mode, bits)))


def test_sixteen_bits_become_their_upper_eight(tmp_path):
    values = RAMP * 16
    for name in ("x.png", "x.tif", "x.jp2"):
        Image.fromarray(values).save(tmp_path / name)
        for mode in ("L", "RGB"):
            found = read(tmp_path / name, mode)
            assert np.array_equal(found if mode == "L" else found[..., 1], values >> 8)


@pytest.mark.parametrize("bits", [8, 9, 12, 14, 16])
@pytest.mark.parametrize("name", ["x.png", "x.tif"])
def test_the_bits_that_are_used_can_be_given(tmp_path, name, bits):
    Image.fromarray(RAMP).save(tmp_path / name)
    assert np.array_equal(read(tmp_path / name, bits=bits), np.minimum(RAMP >> (bits - 8), 255))


@pytest.mark.parametrize("count", [2, 3, 4])
def test_the_bits_of_every_band_can_be_given(tmp_path, count):
    values = np.stack([RAMP + step for step in range(count)], -1) % 4096
    mode = {2: "LA", 3: "RGB", 4: "RGBA"}[count]
    write_png(tmp_path / "x.png", values)
    extra = {2: (0,), 3: (), 4: (0,)}[count]
    photometric = GREY if count == 2 else RGB
    for order in "<>":
        write_tiff(
            tmp_path / f"{order}.tif", values, extra=extra, photometric=photometric, order=order
        )
    for name in ("x.png", "<.tif", ">.tif"):
        assert np.array_equal(read(tmp_path / name, mode, 12), values >> 4), name
        assert np.array_equal(read(tmp_path / name, mode), values >> 8), name


def test_a_tiff_that_states_its_largest_value_is_believed(tmp_path):
    for dtype, count, mode in ((np.uint16, 1, "L"), (np.uint16, 3, "RGB")):
        values = np.repeat(RAMP[..., None], count, 2).astype(dtype)
        photometric = RGB if count == 3 else GREY
        write_tiff(
            tmp_path / "x.tif", values, photometric=photometric, tags=((MAX_SAMPLE_VALUE, 4000),)
        )
        found = read(tmp_path / "x.tif", mode)
        assert np.array_equal(found.reshape(64, 64, count), values >> 4)
        assert np.array_equal(read(tmp_path / "x.tif", mode, 16).reshape(values.shape), values >> 8)


def test_a_tiff_of_twelve_bits_a_sample_has_twelve(tmp_path):
    values = RAMP.reshape(-1, 2).astype(int)
    first, second = values.T
    packed = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], 1)
    write_tiff(
        tmp_path / "x.tif", packed.astype(np.uint8).reshape(64, 96, 1), photometric=GREY, tags=()
    )
    content = bytearray((tmp_path / "x.tif").read_bytes())
    for tag, value in ((256, 64), (258, 12)):
        place = content.index(struct.pack("<HH", tag, 3))
        content[place + 8 : place + 10] = struct.pack("<H", value)
    (tmp_path / "x.tif").write_bytes(content)
    assert np.array_equal(read(tmp_path / "x.tif"), RAMP >> 4)


@pytest.mark.parametrize("scale", ["low", "shifted", "replicated", "rounded"])
@pytest.mark.parametrize("top", [4095, 100])
def test_significant_bits_of_a_png_are_looked_for_where_they_are(tmp_path, scale, top):
    """By the specification they are scaled to 16 bits; many writers leave them in the low ones."""
    samples = RAMP % (top + 1)
    values = {
        "low": samples,
        "shifted": samples << 4,
        "replicated": samples << 4 | samples >> 8,
        "rounded": np.rint(samples * (65535 / 4095)).astype(np.uint16),
    }[scale]
    write_png(tmp_path / "x.png", values, significant=12)
    assert np.abs(read(tmp_path / "x.png").astype(int) - (samples >> 4)).max() <= 1
    assert np.array_equal(read(tmp_path / "x.png", bits=16), values >> 8)


def test_a_grey_map_states_its_range(tmp_path):
    head = b"P5 64 64 4095\n"
    (tmp_path / "x.pgm").write_bytes(head + RAMP.astype(">u2").tobytes())
    assert np.abs(read(tmp_path / "x.pgm").astype(int) - (RAMP >> 4)).max() <= 1


@pytest.mark.parametrize("largest", [4095, 65535])
@pytest.mark.parametrize("colours, plain", [(1, False), (3, False), (3, True)])
def test_the_samples_of_a_portable_map_are_as_stored(tmp_path, colours, plain, largest):
    values = RAMP[:, : 21 * colours].reshape(64, 21, colours)
    kind = {(1, False): "P5", (3, False): "P6", (3, True): "P3"}[colours, plain]
    samples = values.astype(">u2").tobytes()
    samples = " ".join(map(str, values.ravel())).encode() if plain else samples
    (tmp_path / "x.ppm").write_bytes(f"{kind} 21 64 {largest}\n".encode() + samples)
    mode = "L" if colours == 1 else "RGB"
    found = read(tmp_path / "x.ppm", mode, bits=12).reshape(values.shape)
    assert np.array_equal(found, values >> 4)
    shift = 4 if largest == 4095 else 8
    assert np.array_equal(read(tmp_path / "x.ppm", mode).reshape(values.shape), values >> shift)


def test_what_was_used_is_noted(tmp_path):
    Image.fromarray(RAMP).save(tmp_path / "x.png")
    for bits, noted in ((None, (12, 16)), (12, (12, 12))):
        assert decode(str(tmp_path / "x.png"), Decoding("L", bits)).info[USED] == noted
    Image.fromarray(RAMP.astype(np.uint8)).save(tmp_path / "x.png")
    assert USED not in decode(str(tmp_path / "x.png"), Decoding("L")).info


def test_the_key_of_the_spec_reaches_the_reader(tmp_path):
    Image.fromarray(RAMP).save(tmp_path / "x.png")
    image = open_train(folder_spec(tmp_path, channels=1, bits=12)).image(0)
    assert np.array_equal(np.asarray(image), RAMP >> 4)


# -------------------------------------------------------------------------- told before a run


def test_images_of_few_levels_are_told_with_the_key_that_helps(tmp_path):
    for number in range(20):
        Image.fromarray(RAMP).save(tmp_path / f"{number:02}.png")
    (tmp_path / "07.png").write_bytes(b"damaged")  # the run names it
    said = few_levels(open_train(folder_spec(tmp_path, channels=1)))
    assert said == (
        f"{tmp_path / '00.png'} and 7 more of 8 images looked at: 16-bit samples that use 12 bits "
        "of 16 keep at most 16 of 256 levels; data.bits=12 keeps them all"
    )
    assert few_levels(open_train(folder_spec(tmp_path, channels=1, bits=12))) is None


def test_colour_of_few_levels_is_told_too(tmp_path):
    write_png(tmp_path / "x.png", np.repeat(RAMP[..., None], 3, 2))
    said = few_levels(open_train(folder_spec(tmp_path)))
    assert said and said.startswith(f"{tmp_path / 'x.png'} of 1 images") and "data.bits=12" in said


def test_colour_in_the_low_bytes_alone_is_told(tmp_path):
    write_png(tmp_path / "x.png", np.full((4, 4, 3), 200, np.uint16))
    warning = few_levels(open_train(folder_spec(tmp_path)))
    assert warning and "use 8 bits of 16" in warning and "data.bits=8" in warning


@pytest.mark.parametrize("values", [RAMP * 16, RAMP * 8, RAMP * 0, RAMP.astype(np.uint8)])
def test_images_with_levels_enough_are_not_spoken_of(tmp_path, values):
    Image.fromarray(values).save(tmp_path / "x.png")
    assert few_levels(open_train(folder_spec(tmp_path, channels=1))) is None
