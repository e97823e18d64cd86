"""Changes of colour that a device makes, against Pillow: every byte."""

from functools import cache, partial, reduce

import numpy as np
import pytest
from PIL import Image
from support.ferry import Ferry
from support.native import lively_state, tiny_spec

from triptych.core import config
from triptych.core.config.spec import RunSpec
from triptych.core.data import deferred, open_train, pixels
from triptych.core.data.pipeline import Pipeline
from triptych.core.errors import UserError
from triptych.core.methods import colours, staging
from triptych.core.reference import ops as numpy_ops

MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
CASES = {
    "brightness": [{"factor": f} for f in (0.0, 0.6, 1.0, 1.37)],
    "contrast": [{"factor": f} for f in (0.0, 0.61, 1.0, 1.4)],
    "saturation": [{"factor": f} for f in (0.0, 0.83, 1.0, 1.8)],
    "hue": [{"shift": s} for s in (-0.5, -0.1, 0.0, 0.07, 0.5)],
    "grayscale": [{}],
    "gaussian_blur": [{"radius": r} for r in (0.1, 0.5, 1.0, 1.7, 2.3)],
    "solarize": [{"threshold": t} for t in (0, 128, 255)],
}
SIZES = [(1, 1), (2, 3), (7, 5), (16, 24)]


NUMPY = numpy_ops, np.array, np.asarray


@pytest.fixture
def ops(backend, backend_name):
    """The operations of a backend, and how to get tensors in and out."""
    spec = tiny_spec("float32")
    engine = backend.build(spec, lively_state(spec))
    return backend.ops, engine.tensor, engine.array


def planes(image, channels):
    out = np.empty((channels, image.height, image.width), np.uint8)
    pixels.write_planes(image, out)
    return out


def pictures(channels, size, count):
    """Noise, with plain and grey pixels among it, as hue has branches for."""
    rng = np.random.default_rng([channels, *size])
    found = rng.integers(0, 256, (count, channels, *size), np.uint8)
    found[0] = found[0, :1]
    found[-1] //= 128
    return found


def image_of(bands):
    return Image.merge(MODES[len(bands)], [Image.fromarray(band) for band in bands])


def on_device(ops, images, several):
    """``colours.changed`` of images with a list of changes for each."""
    own, tensor, array = ops
    table = np.zeros((len(images), 9, deferred.WIDTH), np.float32)
    for row, changes in zip(table, several, strict=True):
        deferred.write_table(changes, row)
    groups = [each._replace(values=tensor(each.values)) for each in deferred.grouped(table)]
    return array(colours.changed(own, tensor(images), groups))


def assert_bytes(ops, size, channels):
    changes = [partial(getattr(pixels, n), **given) for n, all_ in CASES.items() for given in all_]
    images = pictures(channels, size, len(changes))
    found = on_device(ops, images, [[change] for change in changes])
    assert found.dtype == np.uint8
    for change, image, result in zip(changes, images, found, strict=True):
        want = planes(change(image_of(image)), channels)
        np.testing.assert_array_equal(result, want, str(change))


@pytest.mark.parametrize("channels", MODES)
@pytest.mark.parametrize("size", SIZES)
def test_every_operation_gives_the_bytes_of_pillow(ops, size, channels):
    assert_bytes(ops, size, channels)


@pytest.mark.parametrize("channels", MODES)
def test_numpy_gives_them_too(channels):
    assert_bytes(NUMPY, (7, 6), channels)


def test_changes_of_each_image_come_in_its_own_order(ops):
    rng, changes = np.random.default_rng(3), []
    for _ in range(24):
        names = rng.permutation([*CASES])[: rng.integers(0, 8)]
        picks = [(n, CASES[n][rng.integers(len(CASES[n]))]) for n in names]
        changes.append([partial(getattr(pixels, n), **given) for n, given in picks])
    images = pictures(3, (9, 12), len(changes))
    found = on_device(ops, images, changes)
    for drawn, image, result in zip(changes, images, found, strict=True):
        want = reduce(lambda picture, change: change(picture), drawn, image_of(image))
        np.testing.assert_array_equal(result, planes(want, 3))
    assert (found != images).any()


def test_a_wrong_rounding_or_order_is_seen():
    blur = [partial(pixels.gaussian_blur, radius=1.7)]
    images = pictures(3, (9, 12), 3)[1:2]
    want = planes(blur[0](image_of(images[0])), 3)
    group = deferred.grouped(table_of(blur))[0]
    for wrong in (group._replace(values=group.values + np.float32(1000)), None):
        changes = [wrong] if wrong else []
        assert (colours.changed(numpy_ops, images, changes)[0] != want).any()


def table_of(changes):
    table = np.zeros((1, 9, deferred.WIDTH), np.float32)
    deferred.write_table(changes, table[0])
    return table


# ----------------------------------------------------------------------------------- whole batches


def spec_of(on_device, *overrides) -> RunSpec:
    small = ("data.workers=0", "train.batch_size=6", "train.accumulate=1", "threads=1")
    switch = f"augment.on_device={str(on_device).lower()}"
    return config.load("moco_v3/vit_base", [*DIGITS, *small, switch, *overrides])


DIGITS = (
    *("data={name: digits}", "model={name: vit, width: 8, depth: 1, heads: 2}"),
    *("model.image_size=[12, 17]", "model.patch_size=1", "model.channels=3", "precision=float64"),
)


@cache
def loaded(on_device):
    """The spec and a batch of it."""
    spec = spec_of(on_device)
    with Pipeline(spec, open_train(spec)) as pipeline:
        pipeline.as_bytes = True
        return spec, next(iter(pipeline.batches(0, 1)))


def staged(package, spec, batch, carried):
    engine = package.build(spec, lively_state(spec))
    engine.courier = Ferry(engine) if carried else None
    parts = staging.divided(batch, 2)
    _, found = staging.on_device(engine.ops, batch, parts, engine.tensor, engine.courier)
    return [np.concatenate([engine.array(part.views[i]) for part in found]) for i in range(2)]


@pytest.mark.parametrize("carried", [True, pytest.param(False, marks=pytest.mark.one_backend)])
def test_a_batch_is_the_one_that_the_host_would_make(backend, carried):
    """Micro-batches, both views, copied or in the memory of the host: bit for bit."""
    views = []
    for switch in (False, True):
        spec, batch = loaded(switch)
        assert bool(batch.changes) == switch
        views.append((batch.views, staged(backend, spec, batch, carried)))
    (host, want), (crops, found) = views
    assert any((a != b).any() for a, b in zip(host, crops, strict=True))
    for a, b in zip(found, want, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("recipe", "change", "reason"),
    [
        ("moco_v3/digits", "augment.engine=opencv", "a device has no engine: opencv"),
        ("moco_v3/digits", "augment.view1=[{op: random_erase}]", "a device has no random_erase"),
        ("moco_v3/digits_finetune", "seed=1", "the host mixes finished images"),
    ],
)
def test_what_no_device_does_is_refused(recipe, change, reason):
    with pytest.raises(UserError, match=f"augment.on_device: true: {reason}; set it to false"):
        config.load(recipe, [change, "augment.on_device=true"])


def test_the_host_makes_what_comes_before_an_operation_of_its_own():
    resize = partial(pixels.crop_resize, box=(0, 0, 4, 4), size=(4, 4), interpolation="bilinear")
    grey, wide = pixels.grayscale, partial(pixels.gaussian_blur, radius=3.0)
    flip, plain = pixels.horizontal_flip, partial(pixels.solarize, threshold=128)
    assert deferred.divided([resize, grey, flip, plain]) == ([resize, flip], [grey, plain])
    assert deferred.divided([resize, grey, wide, plain]) == ([resize, grey, wide], [plain])
