"""Data parallelism changes no number: proved on the NumPy engine with processes joined by pipes."""

import numpy as np
import pytest
from support.divided import METHODS, SPECS, differences, in_parts, spec_of
from support.marks import marked
from support.native import draws, hyper, lively_state, random_batch, tiny_spec
from support.processes import PipeRanks, together
from support.shares import share

from triptych.core import reference
from triptych.core.contracts import ALONE, Batch
from triptych.core.methods import accumulate, mixing, moca, moco

STEPS = 2


def trained(spec, ranks, batch_of=random_batch, count=STEPS):
    """Losses, metrics, features, gradients and state of some steps, by name and step."""
    engine, record = reference.build(spec, lively_state(spec), ranks), {}
    for step in range(count):
        drawn = draws(spec, step)
        part = share(batch_of(spec, step), drawn, ranks.replicas)
        values, gradients = engine.trace_step(part, drawn, hyper())
        for name, array in {**values, **{f"grad/{n}": g for n, g in gradients.items()}}.items():
            record[f"{name}/{step}"] = array
    return {**record, **engine.export_state()}


def on_copies(mesh, spec, *arguments):
    ranks = PipeRanks(mesh, mesh.world, spec.batch_norm.virtual_ranks)
    return trained(spec, ranks, *arguments)


CASES = {
    **SPECS,
    "finetune, permuted": spec_of(
        {**METHODS["finetune"], "mixing": {"mixup": 0.8, "partner": "permuted", "mode": "elem"}}
    ),
    "moco_v3 of a ResNet": tiny_spec(case="moco_v3_resnet18"),
    "moco_v1 of a ResNet": tiny_spec(case="moco_v1_resnet18", batch_norm={"virtual_ranks": 1}),
}
FORMS = ("moco_v1 of virtual ranks", "finetune of virtual ranks", "moco_v1 of a ResNet")


@pytest.mark.parametrize("name", marked(CASES, FORMS, pytest.mark.parallel))
def test_two_copies_are_one_process(name):
    """Of real ranks, which share no statistics, and of ranks whose batch norms share them."""
    whole = trained(CASES[name], ALONE)
    first, second = together(2, on_copies, CASES[name])
    assert differences(first, whole) == []
    same = {name: array for name, array in second.items() if "running" not in name}
    assert all(np.array_equal(array, first[name]) for name, array in same.items())


@pytest.mark.parallel
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("name", CASES)
def test_copies_are_one_process_for_five_steps(name, world):
    whole = trained(CASES[name], ALONE, random_batch, 5)
    (first, *_) = together(world, on_copies, CASES[name], random_batch, 5)
    assert differences(first, whole) == []


@pytest.mark.parallel
@pytest.mark.parametrize("name", ["moco_v1", "moco_v3", "moca", "linear", "finetune"])
def test_the_losses_of_thirty_steps_are_those_of_one_process(name):
    whole = trained(SPECS[name], ALONE, random_batch, 30)
    (first, _) = together(2, on_copies, SPECS[name], random_batch, 30)
    for step in range(30):
        loss = f"loss/{step}"
        np.testing.assert_allclose(first[loss], whole[loss], rtol=1e-10, err_msg=loss)


@pytest.mark.parametrize(
    ("name", "world", "parts"),
    [
        ("moco_v3", 2, 2),
        ("moca", 2, 2),
        pytest.param("moco_v1", 4, 2, marks=pytest.mark.parallel),
        pytest.param("finetune", 4, 2, marks=pytest.mark.parallel),
        pytest.param("moca", 4, 1, marks=pytest.mark.parallel),
    ],
)
def test_copies_accumulate_too(name, world, parts):
    whole = trained(SPECS[name], ALONE, random_batch, 1)
    (first, *_) = together(world, on_copies, in_parts(SPECS[name], parts), random_batch, 1)
    assert differences(first, whole) == []


@pytest.mark.parametrize(
    ("virtual_ranks", "world"), [pytest.param(2, 4, marks=pytest.mark.parallel), (4, 2)]
)
def test_virtual_ranks_are_real_ranks(virtual_ranks, world):
    """Two copies share statistics, or one copy has two virtual ranks."""
    spec = tiny_spec(case="moco_v1_resnet18", batch_norm={"virtual_ranks": virtual_ranks})
    whole = trained(spec, ALONE)
    (first, *_) = together(world, on_copies, spec)
    for name, array in whole.items():
        np.testing.assert_allclose(first[name], array, rtol=1e-10, atol=1e-10, err_msg=name)


def smaller(spec, step):
    """A last batch of an epoch, which two copies do not share evenly."""
    batch = random_batch(spec, step)
    return Batch(tuple(v[:5] for v in batch.views), batch.index[:5], batch.labels[:5])


@pytest.mark.parametrize("name", ["linear", "finetune, permuted"])
def test_an_uneven_last_batch_is_shared_too(name):
    whole = trained(CASES[name], ALONE, smaller)
    (first, _) = together(2, on_copies, CASES[name], smaller)
    assert differences(first, whole) == []


def test_a_uneven_batch_norm_counts_each_image_once():
    spec = spec_of({"name": "finetune", "classes": 5}, tiny_spec(case="moco_v1_resnet18").model)
    whole = trained(spec, ALONE, smaller)
    (first, _) = together(2, on_copies, spec, smaller)
    assert differences(first, whole) == []


def first_rows(x, part):
    return x[: len(part.index)]


def own_order(draws, batch):
    return {**mixing.first(draws, len(batch.index))}


MUTATIONS = {
    "a share is forgotten": (
        "moco_v3",
        accumulate.Accumulation,
        "_weighted",
        lambda self, part, outcome: outcome,
    ),
    "each copy keeps its own word statistics": (
        "moca",
        moca,
        "averaged",
        lambda ops, group, values: values,
    ),
    "keys of the first copy for all": ("moco_v1", moco, "rows_of", first_rows),
    "views mixed up": (
        "moca",
        accumulate,
        "gathered",
        lambda ops, replicas, x, batch: replicas.gather(x),
    ),
    "partners of the first copy": ("finetune", mixing, "of_batch", own_order),
    "the loss of one copy": (
        "linear",
        accumulate,
        "summed_by_name",
        lambda ops, group, values: dict(values),
    ),
    "gradients of one copy": (
        "linear",
        reference.Engine,
        "sum_gradients",
        lambda self: None,
    ),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_wrong_exchange_is_noticed(monkeypatch, name):
    case, place, attribute, function = MUTATIONS[name]
    whole = trained(SPECS[case], ALONE, random_batch, 1)
    monkeypatch.setattr(place, attribute, function)
    (first, _) = together(2, on_copies, SPECS[case], random_batch, 1)
    assert differences(first, whole)


def test_statistics_of_one_copy_are_noticed():
    spec = CASES["moco_v3 of a ResNet"]
    whole = trained(spec, ALONE, random_batch, 1)
    wrong = spec.model_copy(update={"batch_norm": replace_ranks(spec, 2)})
    (first, _) = together(2, on_copies, wrong, random_batch, 1)
    assert differences(first, whole)


def replace_ranks(spec, count):
    return spec.batch_norm.model_copy(update={"virtual_ranks": count})
