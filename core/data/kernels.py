"""Loops over pixels that give Pillow's bytes in less time, for Numba to compile.

Only ``compiled`` imports this module, in a process of its own; training runs the machine code.

- A view is ``planes``, uint8 (C, H, W), changed in place. ``count`` is H x W.
- Inner loops run over neighbouring bytes, without calls and branches, so that the compiler can use
  vector instructions. Numba would widen integers to 64 bits, so every step names its type.
- The arithmetic is Pillow's, operation by operation: where it rounds, these loops round.
"""

from typing import Any, TypeAlias

import numpy as np
from numba import carray, cfunc, njit, types

from triptych.core.data.compiled import SIGNATURES

i32, u32, u8, f32 = np.int32, np.uint32, np.uint8, np.float32
_PLACES = 22
"""Binary places of a weight of a resize."""
_BOX_PLACES = 24
"""Binary places of a weight of a box blur."""
_TYPES = {
    "L": types.int64,
    "U": types.uint32,
    "F": types.float32,
    "b": types.CPointer(types.uint8),
    "i": types.CPointer(types.int32),
    "l": types.CPointer(types.int64),
    "f": types.CPointer(types.float32),
}

Pointer: TypeAlias = Any
"""The address of an array; ``SIGNATURES`` has the type of its elements."""
KERNELS: dict[str, Any] = {}
"""Name -> compiled function of C's calling convention."""


def _kernel(function):
    """Compiles a function of ``SIGNATURES``, without checks of divisors."""
    signature = types.void(*(_TYPES[letter] for letter in SIGNATURES[function.__name__]))
    KERNELS[function.__name__] = cfunc(signature, error_model="numpy")(function)
    return function


_inlined = njit(error_model="numpy")


# ------------------------------------------------------------------------------------------ resize


@_inlined
def _cubic(distance):
    if distance < 1:
        return (1.5 * distance - 2.5) * distance * distance + 1
    if distance < 2:
        return (((distance - 5) * distance + 8) * distance - 4) * -0.5
    return 0.0


@_inlined
def _share(distance, cubic):
    return _cubic(distance) if cubic else max(1.0 - distance, 0.0)


@_kernel
def resize_weights(
    source: int, target: int, cubic: int, starts_: Pointer, taps_: Pointer, table_: Pointer
) -> None:
    """The weights of the pixels of a resize along one axis.

    Every pixel gets as many weights, ``taps``, so that loops over them have a fixed length; some
    are 0.

    Args:
        source: length of the axis.
        target: length of the result.
        cubic: 0 for bilinear, 1 for bicubic.
        starts_: (target,) gets the first pixel of the source for each pixel of the result.
        taps_: gets ``taps``, at most ``source`` and at most 2 ceil(reach) + 1.
        table_: (target, taps) gets the weights, with 22 binary places.
    """
    scale = source / target
    widening = max(scale, 1.0)
    reach = (2.0 if cubic else 1.0) * widening
    starts, taps = carray(starts_, (target,)), 1
    for place in range(target):
        center = (place + 0.5) * scale
        starts[place] = max(int(center - reach + 0.5), 0)
        taps = max(taps, min(int(center + reach + 0.5), source) - starts[place])
    carray(taps_, (1,))[0] = taps
    table = carray(table_, (target, taps))
    for place in range(target):
        center = (place + 0.5) * scale
        begin, end = starts[place], min(int(center + reach + 0.5), source)
        starts[place] = min(begin, source - taps)
        total = 0.0
        for k in range(taps):
            table[place, k] = 0
        for k in range(begin, end):
            total += _share(abs((k - center + 0.5) * (1.0 / widening)), cubic)
        for k in range(begin, end):
            weight = _share(abs((k - center + 0.5) * (1.0 / widening)), cubic)
            weight = (weight / total if total != 0.0 else weight) * (1 << _PLACES)
            table[place, k - starts[place]] = i32(weight + (0.5 if weight >= 0 else -0.5))


@_inlined
def _clipped(total):
    return u8(min(max(i32(total >> _PLACES), i32(0)), i32(255)))


@_kernel
def resize_across(
    pixels_: Pointer,
    stride: int,
    height: int,
    starts_: Pointer,
    table_: Pointer,
    taps: int,
    width: int,
    out_: Pointer,
) -> None:
    """Resamples the rows of an image whose pixels have four bytes.

    Args:
        pixels_: first needed pixel; the next row is ``stride`` bytes further.
        height: number of rows.
        starts_: (width,) as of ``resize_weights``, with ``table_`` (width, taps).
        out_: (height, width, 4).
    """
    starts, table = carray(starts_, (width,)), carray(table_, (width, taps))
    pixels, out = carray(pixels_, (height, stride)), carray(out_, (height, width, 4))
    half = i32(1 << (_PLACES - 1))
    for y in range(height):
        row, target = pixels[y], out[y]
        for x in range(width):
            first = 4 * starts[x]
            a, b, c, d = half, half, half, half
            for k in range(taps):
                weight = table[x, k]
                at = first + 4 * k
                a = i32(a + i32(weight * i32(row[at])))
                b = i32(b + i32(weight * i32(row[at + 1])))
                c = i32(c + i32(weight * i32(row[at + 2])))
                d = i32(d + i32(weight * i32(row[at + 3])))
            target[x, 0] = _clipped(a)
            target[x, 1] = _clipped(b)
            target[x, 2] = _clipped(c)
            target[x, 3] = _clipped(d)


@_kernel
def resize_grey_across(
    pixels_: Pointer,
    stride: int,
    height: int,
    starts_: Pointer,
    table_: Pointer,
    taps: int,
    width: int,
    out_: Pointer,
) -> None:
    """``resize_across`` for pixels of one byte; out_ is (height, width)."""
    starts, table = carray(starts_, (width,)), carray(table_, (width, taps))
    pixels, out = carray(pixels_, (height, stride)), carray(out_, (height, width))
    for y in range(height):
        row, target = pixels[y], out[y]
        for x in range(width):
            total = i32(1 << (_PLACES - 1))
            for k in range(taps):
                total = i32(total + i32(table[x, k] * i32(row[starts[x] + k])))
            target[x] = _clipped(total)


@_kernel
def resize_down(
    rows_: Pointer,
    rows: int,
    width: int,
    starts_: Pointer,
    table_: Pointer,
    taps: int,
    height: int,
    channels: int,
    sums_: Pointer,
    planes_: Pointer,
) -> None:
    """Resamples the columns of rows, and writes planes.

    Args:
        rows_: (rows, width) pixels of four bytes, or of one byte for one channel.
        starts_: (height,) as of ``resize_weights``, with ``table_`` (height, taps).
        channels: of the result; of two, the second one is the last byte of a pixel.
        sums_: (width x bytes of a pixel,) gets intermediate sums.
        planes_: (channels, height, width).
    """
    size = 1 if channels == 1 else 4
    starts, table = carray(starts_, (height,)), carray(table_, (height, taps))
    source, sums = carray(rows_, (rows, width * size)), carray(sums_, (width * size,))
    planes = carray(planes_, (channels, height, width))
    for y in range(height):
        weight, row = table[y, 0], source[starts[y]]
        for i in range(len(sums)):
            sums[i] = i32(i32(1 << (_PLACES - 1)) + i32(weight * i32(row[i])))
        for k in range(1, taps):
            weight, row = table[y, k], source[starts[y] + k]
            for i in range(len(sums)):
                sums[i] = i32(sums[i] + i32(weight * i32(row[i])))
        for channel in range(channels):
            plane, band = planes[channel, y], 3 if channels == 2 and channel == 1 else channel
            if size == 1:
                for x in range(width):
                    plane[x] = _clipped(sums[x])
            else:
                for x in range(width):
                    plane[x] = _clipped(sums[4 * x + band])


# ------------------------------------------------------------------------------------------ colour


@_inlined
def _blended(other, value, factor):
    """other + factor (value - other), clipped, in single precision."""
    mixed = f32(other + f32(factor * f32(value - other)))
    return u8(i32(min(max(mixed, f32(0)), f32(255))))


@_inlined
def _luma(r, g, b):
    """The luminance of ITU-R 601, 16 binary places."""
    total = i32(i32(i32(19595) * i32(r)) + i32(i32(38470) * i32(g)))
    return i32(i32(i32(total + i32(i32(7471) * i32(b))) + i32(32768)) >> 16)


@_kernel
def blend(values_: Pointer, count: int, other: float, factor: float) -> None:
    """Blends values with one value: 0 is that value, 1 the values themselves."""
    values = carray(values_, (count,))
    for i in range(count):
        values[i] = _blended(other, f32(values[i]), factor)


@_kernel
def luma_sum(planes_: Pointer, count: int, colours: int, total_: Pointer) -> None:
    """The sum of the luminances of all pixels, each rounded."""
    planes, total = carray(planes_, (colours, count)), 0
    red = planes[0]
    if colours == 1:
        for i in range(count):
            total += red[i]
    else:
        green, blue = planes[1], planes[2]
        for i in range(count):
            total += _luma(red[i], green[i], blue[i])
    carray(total_, (1,))[0] = total


@_kernel
def saturate(planes_: Pointer, count: int, factor: float) -> None:
    """Blends each pixel with its luminance."""
    planes = carray(planes_, (3, count))
    red, green, blue = planes[0], planes[1], planes[2]
    for i in range(count):
        grey = f32(_luma(red[i], green[i], blue[i]))
        red[i] = _blended(grey, f32(red[i]), factor)
        green[i] = _blended(grey, f32(green[i]), factor)
        blue[i] = _blended(grey, f32(blue[i]), factor)


@_kernel
def grey(planes_: Pointer, count: int) -> None:
    """Writes the luminance to the first plane."""
    planes = carray(planes_, (3, count))
    red, green, blue = planes[0], planes[1], planes[2]
    for i in range(count):
        red[i] = u8(_luma(red[i], green[i], blue[i]))


@_inlined
def _hue_of(r, g, b, v, least, spread):
    """The hue of a colour, 0 ... 255.

    Args:
        v: the largest value.
        least: the smallest one.
        spread: their difference, at least 1.
    """
    # Sixths of the circle from the nearest of red, yellow, green, cyan, blue and magenta.
    away = f32(f32(i32(i32(i32(v - r) + i32(v - g)) + i32(v - b)) - i32(v - least)) / f32(spread))
    sixths = f32(f32(5) - away) if g == least else f32(f32(3) + away)
    other = f32(f32(3) - away) if r == least else f32(f32(1) + away)
    sixths = other if g == v else sixths
    other = f32(f32(1) - away) if b == least else f32(away - f32(1))
    sixths = other if r == v else sixths
    turns = f32(sixths / f32(6))
    return i32(f32((f32(turns + f32(1)) if turns < f32(0) else turns) * f32(255)))


@_inlined
def _toned(v, s, distance):
    """v (1 - s distance), rounded, as 255ths; ``distance`` is cut to 0 ... 255.

    The product is a whole number under 2^24, so single precision holds it.
    """
    apart = i32(min(i32(max(distance, i32(0))), i32(255)))
    product = i32(v * i32(i32(65025) - i32(s * apart)))
    return u8(i32(f32(f32(product) * f32(1 / 65025)) + f32(0.5)))


@_kernel
def turn_hue(planes_: Pointer, count: int, steps: int) -> None:
    """Turns the colour circle by ``steps`` of 256, by way of hue, saturation and value."""
    planes, turn = carray(planes_, (3, count)), i32(steps)
    red, green, blue = planes[0], planes[1], planes[2]
    for i in range(count):
        r, g, b = i32(red[i]), i32(green[i]), i32(blue[i])
        v, least = i32(max(i32(max(r, g)), b)), i32(min(i32(min(r, g)), b))
        spread = i32(v - least)
        hue = _hue_of(r, g, b, v, least, i32(max(spread, i32(1))))
        hue = i32(i32((hue if spread > i32(0) else i32(0)) + turn) & i32(255))
        s = i32(f32(f32(f32(spread) / f32(i32(max(v, i32(1))))) * f32(255)))
        six = i32(hue * i32(6))
        red[i] = _toned(v, s, i32(min(i32(six - i32(255)), i32(i32(1275) - six))))
        green[i] = _toned(v, s, i32(max(i32(i32(255) - six), i32(six - i32(765)))))
        blue[i] = _toned(v, s, i32(max(i32(i32(765) - six), i32(six - i32(1275)))))


# ------------------------------------------------------------------------- neighbourhood and place


@_inlined
def _boxed(here, beside, beyond, weights):
    """The mean of a pixel, its two neighbours and the two beyond them, weighted."""
    total = u32(u32(weights[0] * u32(here)) + u32(weights[1] * u32(beside)))
    total = u32(total + u32(weights[2] * u32(beyond)))
    return u8(u32(total + u32(1 << (_BOX_PLACES - 1))) >> u32(_BOX_PLACES))


@_kernel
def box_across(
    plane_: Pointer, height: int, width: int, here: int, beside: int, beyond: int, padded_: Pointer
) -> None:
    """Three box blurs of each row, of at most five pixels.

    Args:
        here: weight of the middle pixel, 24 binary places.
        beside: weight of each neighbour.
        beyond: weight of the pixels after the neighbours.
        padded_: (width + 4,) gets the row with its ends repeated.
    """
    plane, padded = carray(plane_, (height, width)), carray(padded_, (width + 4,))
    weights = (here, beside, beyond)
    for y in range(height):
        row = plane[y]
        for _ in range(3):
            for x in range(width):
                padded[x + 2] = row[x]
            padded[0] = padded[1] = row[0]
            padded[width + 2] = padded[width + 3] = row[width - 1]
            for x in range(width):
                near = i32(i32(padded[x + 1]) + i32(padded[x + 3]))
                far = i32(i32(padded[x]) + i32(padded[x + 4]))
                row[x] = _boxed(i32(padded[x + 2]), near, far, weights)


@_kernel
def box_down(
    source_: Pointer, height: int, width: int, here: int, beside: int, beyond: int, target_: Pointer
) -> None:
    """One box blur of each column; weights as of ``box_across``."""
    source, target = carray(source_, (height, width)), carray(target_, (height, width))
    weights = (here, beside, beyond)
    for y in range(height):
        above2, above, row = source[max(y - 2, 0)], source[max(y - 1, 0)], source[y]
        below, below2 = source[min(y + 1, height - 1)], source[min(y + 2, height - 1)]
        out = target[y]
        for x in range(width):
            near = i32(i32(above[x]) + i32(below[x]))
            out[x] = _boxed(i32(row[x]), near, i32(i32(above2[x]) + i32(below2[x])), weights)


@_kernel
def solarize(values_: Pointer, count: int, threshold: int) -> None:
    """Inverts the values that are not below ``threshold``."""
    values, least = carray(values_, (count,)), i32(threshold)
    for i in range(count):
        value = i32(values[i])
        values[i] = u8(value if value < least else i32(i32(255) - value))


@_kernel
def normalize(values_: Pointer, count: int, mean: float, deviation: float, out_: Pointer) -> None:
    """(x / 255 - mean) / deviation, each step rounded to single precision."""
    values, out = carray(values_, (count,)), carray(out_, (count,))
    for i in range(count):
        out[i] = f32(f32(f32(f32(values[i]) / f32(255)) - mean) / deviation)
