"""Micro-batches change no number: losses, gradients and weights are those of the whole batch."""

from contextlib import nullcontext
from dataclasses import replace
from functools import cache

import pytest
from support.divided import METHODS, MODEL, SPECS, differences, in_parts, spec_of
from support.native import TINY, draws, hyper, lively_state, random_batch, tiny_spec

from triptych.core import reference
from triptych.core.methods import accumulate, moca
from triptych.core.methods.accumulate import Accumulation

PARTS = [
    *(pytest.param(name, 2, marks=pytest.mark.one_backend) for name in SPECS),
    *(
        pytest.param(name, 4, marks=pytest.mark.one_backend if "statistics" in name else ())
        for name in SPECS
        if "ranks" not in name
    ),
]


def steps(package, spec, count=5):
    """Losses, metrics, features, gradients and state of ``count`` steps, by name and step."""
    engine, record = package.build(spec, lively_state(spec)), {}
    for step in range(count):
        values, gradients = engine.trace_step(random_batch(spec, step), draws(spec, step), hyper())
        for name, array in {**values, **{f"grad/{n}": g for n, g in gradients.items()}}.items():
            record[f"{name}/{step}"] = array
    record.update(engine.export_state())
    engine.close()
    return record


whole_batch = cache(lambda package, name: steps(package, SPECS[name]))


@pytest.mark.parametrize(("name", "parts"), PARTS)
def test_micro_batches_change_no_number(backend, name, parts):
    changed = differences(steps(backend, in_parts(SPECS[name], parts)), whole_batch(backend, name))
    assert changed == []


@pytest.mark.parametrize("name", SPECS)
def test_the_reference_accumulates_too(name):
    whole = steps(reference, SPECS[name], 1)
    assert differences(steps(reference, in_parts(SPECS[name], 2), 1), whole) == []


def unweighted(self, part, wanted, number, *, first):
    """A micro-batch's loss without its share."""
    features = self.method.predict(self.step, part, number)
    return self.method.loss(self.step, part, features, wanted, number)


def of_the_first_images(self, part):
    """Masks of the first images for every micro-batch."""
    return ROUNDS(self, replace(part, first=0))


ROUNDS = moca._rounds
MUTATIONS = {
    "a share is forgotten": ("finetune", Accumulation, "_share", unweighted),
    "masks of other images": ("moca", moca, "_rounds", of_the_first_images),
    "statistics of every part": (
        "moco_v3 of virtual ranks",
        accumulate,
        "tracking",
        lambda step, branch, flag: nullcontext(),
    ),
    "views mixed up": ("moca", accumulate, "joined", lambda ops, x, parts: ops.concat(x, axis=0)),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_wrong_accumulation_is_noticed(monkeypatch, name):
    case, place, attribute, function = MUTATIONS[name]
    whole = steps(reference, SPECS[case], 1)
    monkeypatch.setattr(place, attribute, function)
    assert differences(steps(reference, in_parts(SPECS[case], 2), 1), whole)


def test_the_views_of_moco_v3_are_differentiated_one_by_one(monkeypatch):
    """The activations of one view at a time, of the micro-batches one after the other."""
    spec, order = in_parts(tiny_spec(), 2), []
    engine = reference.build(spec, lively_state(spec))
    encoded, differentiate = engine.model.encoded, engine.differentiate

    def watched(compute, *inputs):
        order.append("gradients")
        return differentiate(compute, *inputs)

    def encoding(branch, view):
        order.append(branch)
        return encoded(branch, view)

    monkeypatch.setattr(engine, "differentiate", watched)
    monkeypatch.setattr(engine.model, "encoded", encoding)
    engine.loss_and_grads(random_batch(spec), draws(spec), hyper())
    view = ["student"] * 2 + ["gradients"] + ["gradients", "student"] * 2
    assert order == ["teacher"] * 4 + 2 * view


RESNET = {"name": "resnet18", "image_size": 32}
FINETUNE = {"name": "finetune", "classes": 5}


@pytest.mark.parametrize(
    ("method", "model", "sections", "message"),
    [
        (FINETUNE, RESNET, {}, "2: the batch norms of resnet18 need the whole batch at once"),
        (METHODS["moco_v1"], RESNET, {}, "the batch norms of resnet18"),
        (
            {"name": "moco_v3"},
            TINY["moco_v3_vit_conv"]["model"],
            {},
            "the batch norms of vit need the whole batch",
        ),
        (
            METHODS["moco_v1"],
            RESNET,
            {"batch_norm": {"virtual_ranks": 3}, "batch": 12},
            "batch_norm.virtual_ranks 3 is not divisible by 2",
        ),
        (
            METHODS["moco_v1"],
            RESNET,
            {"batch_norm": {"virtual_ranks": 4}, "batch": 16, "parallel": {"data": 4}},
            "virtual_ranks 4 is not divisible by parallel.data 4 x accumulate 2",
        ),
        (FINETUNE, MODEL, {"batch": 9}, "not divisible by 2"),
    ],
)
def test_what_cannot_be_accumulated_is_refused(method, model, sections, message):
    with pytest.raises(ValueError, match=message):
        spec_of(method, model, parts=2, **sections)
