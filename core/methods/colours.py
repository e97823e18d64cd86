"""Operations on the colours of views as tensors, to the bytes of ``core.data.pixels``.

A device makes them of the bytes that it gets, if ``augment.on_device`` is set. Each step is exact,
or rounds like Pillow: integers, and float32 without fused products and sums.

Shape letters: N images, C channels, H height, W width.
"""

from collections.abc import Callable, Sequence

from triptych.core.contracts import Changes, Ops, Tensor

_PLACES = 24
"""Binary places of a weight of a blur."""


def changed(ops: Ops, view: Tensor, changes: Sequence[Changes]) -> Tensor:
    """A view after changes of some of its images, in order. Alpha stays as it is.

    Args:
        view: (N, C, H, W) uint8.
        changes: with tensors, or with indices on the host.
    """
    colours = 3 if view.shape[1] > 2 else 1
    alpha, whole = view[:, colours:], view[:, :colours]
    whole = ops.cast(whole, "int32")
    for operation, rows, values in changes:
        columns = [values[:, i].reshape((-1, 1, 1, 1)) for i in range(values.shape[1])]
        part = OPERATIONS[operation](ops, ops.gather_rows(whole, rows), *columns)
        whole = ops.replace_rows(whole, rows, part)
    whole = ops.cast(whole, "uint8")
    return ops.concat([whole, alpha], axis=1) if alpha.shape[1] else whole


def brightness(ops: Ops, x: Tensor, factor: Tensor, *_: Tensor) -> Tensor:
    """See ``core.data.pixels``; x: (N, 1 or 3, H, W) int32, factor: (N, 1, 1, 1)."""
    return _blend(ops, x * 0, x, factor)


def contrast(ops: Ops, x: Tensor, factor: Tensor, *_: Tensor) -> Tensor:
    """Likewise."""
    count = x.shape[2] * x.shape[3]
    total = ops.cast(_luma(x), "int64").reshape((x.shape[0], -1)).sum(1)
    mean = ops.cast((total * 2 + count) // (2 * count), "int32")  # rounded
    return _blend(ops, x * 0 + mean.reshape((-1, 1, 1, 1)), x, factor)


def saturation(ops: Ops, x: Tensor, factor: Tensor, *_: Tensor) -> Tensor:
    """Likewise."""
    return _blend(ops, x * 0 + _luma(x), x, factor)


def grayscale(ops: Ops, x: Tensor, *_: Tensor) -> Tensor:
    """Likewise. All colours get the luminance."""
    return x * 0 + _luma(x)


def solarize(ops: Ops, x: Tensor, threshold: Tensor, *_: Tensor) -> Tensor:
    """Likewise; threshold: (N, 1, 1, 1)."""
    return ops.where(x < x * 0 + ops.cast(threshold, "int32"), x, 255 - x)


def hue(ops: Ops, x: Tensor, steps: Tensor, *_: Tensor) -> Tensor:
    """Likewise, by way of hue, saturation and value; steps of 256 in the circle: (N, 1, 1, 1)."""
    if x.shape[1] == 1:
        return x
    r, g, b = x[:, :1], x[:, 1:2], x[:, 2:]
    larger, smaller = ops.where(r > g, r, g), ops.where(r < g, r, g)
    v, least = ops.where(larger > b, larger, b), ops.where(smaller < b, smaller, b)
    spread = v - least
    turned = ops.where(spread > 0, _hue_of(ops, r, g, b, v, least), spread * 0)
    turned = turned + ops.cast(steps, "int32")
    turned = turned - turned // 256 * 256
    share = ops.cast(spread, "float32") / ops.cast(v.clip(1, 255), "float32")
    s, six = ops.cast(share * 255.0, "int32"), turned * 6
    rising, falling = six - 255, 1275 - six
    distances = [
        ops.where(rising < falling, rising, falling),
        ops.where(255 - six > six - 765, 255 - six, six - 765),
        ops.where(765 - six > six - 1275, 765 - six, six - 1275),
    ]
    return ops.concat([_toned(ops, v, s, distance) for distance in distances], axis=1)


def gaussian_blur(ops: Ops, x: Tensor, here: Tensor, beside: Tensor, beyond: Tensor) -> Tensor:
    """Likewise: three box blurs along each axis.

    Args:
        here: (N, 1, 1, 1), weight of a pixel, with 24 binary places.
        beside: weight of each neighbour.
        beyond: weight of the pixels after the neighbours.
    """
    x, here, beside, beyond = (ops.cast(each, "int64") for each in (x, here, beside, beyond))
    for axis in (3, 3, 3, 2, 2, 2):
        before, after = _shifted(ops, x, axis, -1), _shifted(ops, x, axis, 1)
        far = _shifted(ops, before, axis, -1) + _shifted(ops, after, axis, 1)
        total = x * here + (before + after) * beside + far * beyond
        x = (total + (1 << (_PLACES - 1))) // (1 << _PLACES)
    return ops.cast(x, "int32")


OPERATIONS: dict[str, Callable[..., Tensor]] = {
    "brightness": brightness,
    "contrast": contrast,
    "saturation": saturation,
    "hue": hue,
    "grayscale": grayscale,
    "gaussian_blur": gaussian_blur,
    "solarize": solarize,
}


def _luma(x: Tensor) -> Tensor:
    """The luminance of ITU-R 601. (N, 1 or 3, H, W) -> (N, 1, H, W)."""
    if x.shape[1] == 1:
        return x
    return (x[:, :1] * 19595 + x[:, 1:2] * 38470 + x[:, 2:] * 7471 + 32768) // 65536


def _blend(ops: Ops, other: Tensor, x: Tensor, factor: Tensor) -> Tensor:
    """other + factor (x - other), cut to a byte, each step in float32."""
    mixed = ops.cast(factor, "float32") * ops.cast(x - other, "float32")
    return ops.cast((ops.cast(other, "float32") + mixed).clip(0.0, 255.0), "int32")


def _hue_of(ops: Ops, r: Tensor, g: Tensor, b: Tensor, v: Tensor, least: Tensor) -> Tensor:
    """The hue, 0 to 255, of colours with the largest value ``v`` and the smallest ``least``."""
    spread = v - least
    sum_ = ops.cast((v - r) + (v - g) + (v - b) - spread, "float32")
    # Sixths of the circle from the nearest of red, yellow, green, cyan, blue and magenta.
    away = sum_ / ops.cast(spread.clip(1, 255), "float32")
    sixths = ops.where(g == least, 5.0 - away, away + 3.0)
    sixths = ops.where(g == v, ops.where(r == least, 3.0 - away, away + 1.0), sixths)
    sixths = ops.where(r == v, ops.where(b == least, 1.0 - away, away - 1.0), sixths)
    # By a tensor: CUDA multiplies by the reciprocal of a Python number.
    turns = sixths / (sixths * 0.0 + 6.0)
    return ops.cast(ops.where(turns < 0.0, turns + 1.0, turns) * 255.0, "int32")


def _toned(ops: Ops, v: Tensor, s: Tensor, distance: Tensor) -> Tensor:
    """v (1 - s distance), rounded, as 255ths; ``distance`` is cut to 0 ... 255."""
    product = v * (65025 - s * distance.clip(0, 255))
    return ops.cast(ops.cast(product, "float32") * (1 / 65025) + 0.5, "int32")


def _shifted(ops: Ops, x: Tensor, axis: int, step: int) -> Tensor:
    """The neighbour of each pixel along an axis, before it (-1) or after it (1).

    The last pixel is its own neighbour.
    """
    size = x.shape[axis]
    if size == 1:
        return x
    cuts = ((0, 1), (0, size - 1)) if step < 0 else ((1, size), (size - 1, size))
    whole: list[slice] = [slice(None)] * 4
    parts = []
    for start, stop in cuts:
        whole[axis] = slice(start, stop)
        parts.append(x[tuple(whole)])
    return ops.concat(parts, axis=axis)
