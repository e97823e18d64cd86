"""Micro-batches change no number: losses, gradients and weights are those of the whole batch."""

import numpy as np
import pytest
from conftest import assert_close
from support.native import draws, hyper, random_batch

from triptych.core import reference
from triptych.core.config.spec import RunSpec
from triptych.core.parameters import initial_state

MODEL = {
    "name": "vit",
    "width": 16,
    "depth": 3,
    "heads": 2,
    "patch_size": 4,
    "image_size": [8, 12],
    "freeze_patch_embed": False,
}
METHODS = {
    "linear": {"name": "linear", "classes": 5, "rates": [1.0, 0.5]},
    "finetune": {
        "name": "finetune",
        "classes": 5,
        "drop_path": 0.3,
        "mixing": {"mixup": 0.8, "cutmix": 1.0, "smoothing": 0.1},
    },
}


def supervised(method, model=MODEL, batch=8, parts=1):
    """A run in float64 whose steps have ``parts`` micro-batches."""
    given = {
        "precision": "float64",
        "threads": 1,
        "model": model,
        "method": method,
        "train": {"steps": 1, "batch_size": batch, "accumulate": parts},
    }
    return RunSpec.model_validate(given)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("parts", [2, 4])
def test_micro_batches_change_no_number(backend, name, parts):
    whole, split = supervised(METHODS[name]), supervised(METHODS[name], parts=parts)
    state, batch = initial_state(whole), random_batch(whole)
    expected = reference.build(whole, state).trace_step(batch, draws(whole), hyper())
    engine = backend.build(split, state)
    values, gradients = engine.trace_step(batch, draws(split), hyper())
    for kind, (got, wanted) in enumerate(zip((values, gradients), expected, strict=True)):
        assert got.keys() == wanted.keys()
        for key in wanted:
            if not key.endswith("qkv.bias"):  # the third of the keys has no true gradient
                assert_close(got[key], wanted[key], 1e-12 if kind == 0 else 1e-10, key)


def test_a_forgotten_share_is_noticed(monkeypatch):
    whole, split = supervised(METHODS["finetune"]), supervised(METHODS["finetune"], parts=2)
    state, batch = initial_state(whole), random_batch(whole)
    engine = reference.build(split, state)
    part = type(engine)._differentiate_part
    monkeypatch.setattr(
        type(engine), "_differentiate_part", lambda self, b, d, h, share=None: part(self, b, d, h)
    )
    wrong = engine.loss_and_grads(batch, draws(split), hyper())[0]["loss"]
    right = reference.build(whole, state).loss_and_grads(batch, draws(whole), hyper())[0]["loss"]
    assert not np.isclose(wrong, right)


@pytest.mark.parametrize(
    ("model", "batch", "message"),
    [
        ({"name": "resnet18", "image_size": 32}, 8, "batch norms of resnet18"),
        (MODEL, 9, "not divisible by 2"),
    ],
)
def test_what_cannot_be_accumulated_is_refused(model, batch, message):
    with pytest.raises(ValueError, match=message):
        supervised({"name": "finetune", "classes": 5}, model, batch, parts=2)
