"""Tensors that tensor parallelism divides, and blocks that a pipeline divides."""

import numpy as np
import pytest
from conftest import assert_close
from support.divided import SPECS
from support.native import TINY, lively_state, tiny_spec

from triptych.core import parameters
from triptych.core.config.spec import RunSpec
from triptych.core.parallel.sharding import (
    HEADS,
    INPUTS,
    OUTPUTS,
    WHOLE,
    joined_state,
    part_of_state,
    split_of,
    splits,
)
from triptych.core.parallel.stage import widths
from triptych.core.parallel.stages import blocks_of, stages
from triptych.core.reference import encoders
from triptych.core.reference.layers import TRAINING, gelu, head, layer_norm, linear, relu

VITS = ["moco_v3_vit", "moco_v3_vit_conv", "moca_vit"]
MOCA = {"decoder_width": 24, "decoder_heads": 4}
COUNTS = [2, 4]


def spec_of(case, count=1):
    changes = {"method": MOCA} if case == "moca_vit" else {}
    return tiny_spec(case=case, parallel={"tensor": count}, **changes)


def state_of(spec):
    """Model and moments in float64."""
    state = {name: np.asarray(value, np.float64) for name, value in lively_state(spec).items()}
    rng = np.random.default_rng(1)
    moments = {
        f"optimizer.exp_avg.{p.name}": rng.standard_normal(p.shape)
        for p in parameters.table(spec)
        if p.trainable
    }
    return {**state, **moments, "optimizer.step": np.array(3)}


@pytest.mark.parametrize("case", VITS)
@pytest.mark.parametrize("count", COUNTS)
def test_parts_of_a_state_give_it_back(case, count):
    spec = spec_of(case, count)
    state, table = state_of(spec), splits(spec)
    parts = [part_of_state(state, table, rank, count) for rank in range(count)]
    back = joined_state(parts, table)
    assert back.keys() == state.keys()
    for name, array in state.items():
        np.testing.assert_array_equal(back[name], array)
        whole = split_of(name, table) == WHOLE
        assert parts[0][name].size == (array.size if whole else array.size // count)


def test_who_is_divided_and_how():
    found = splits(spec_of("moca_vit"))
    block = "student.encoder.blocks.0."
    want = {
        f"{block}attn.qkv.weight": HEADS,
        f"{block}attn.qkv.bias": HEADS,
        f"{block}attn.proj.weight": INPUTS,
        f"{block}attn.proj.bias": WHOLE,
        f"{block}mlp.fc1.bias": OUTPUTS,
        f"{block}mlp.fc2.weight": INPUTS,
        f"{block}mlp.fc2.bias": WHOLE,
        f"{block}norm1.weight": WHOLE,
        "teacher.encoder.blocks.2.mlp.fc1.weight": OUTPUTS,
        "student.decoder.blocks.0.attn.qkv.weight": HEADS,
        "student.image_predictor.norm.running_var": OUTPUTS,
        "student.image_predictor.norm.num_batches_tracked": WHOLE,
        "student.dense_predictor.last.weight": INPUTS,
        "memory.words": WHOLE,
    }
    assert {name: found[name] for name in want} == want
    v3 = splits(spec_of("moco_v3_vit"))
    kinds = [v3[f"student.projector.{i}.weight"] for i in (0, 1, 3, 4, 6)]
    assert kinds == [OUTPUTS, OUTPUTS, INPUTS, WHOLE, WHOLE]


# ------------------------------------------------------------- computing with parts of the tensors


def block_of_rank(values, name, x, heads, eps):
    """What one process adds to a block's input: attention, then the MLP after all have added."""
    n, length, _ = x.shape

    def attention():
        normal = layer_norm(values, f"{name}.norm1", x, eps)
        qkv = linear(values, f"{name}.attn.qkv", normal).reshape(n, length, 3, heads, -1)
        q, k, v = qkv.transpose(2, 0, 3, 1, 4)
        scores = q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1])
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = weights / weights.sum(-1, keepdims=True) @ v
        rows = mixed.transpose(0, 2, 1, 3).reshape(n, length, -1)
        return rows @ values[f"{name}.attn.proj.weight"].T

    def mlp(y):
        hidden = linear(values, f"{name}.mlp.fc1", layer_norm(values, f"{name}.norm2", y, eps))
        return gelu(hidden) @ values[f"{name}.mlp.fc2.weight"].T

    return attention, mlp


@pytest.mark.parametrize("count", COUNTS)
def test_a_block_computed_by_parts_is_the_whole_one(count):
    spec = spec_of("moco_v3_vit", count)
    state, name = state_of(spec), "student.encoder.blocks.1"
    parts = [part_of_state(state, splits(spec), rank, count) for rank in range(count)]
    x = np.random.default_rng(2).standard_normal((3, 7, spec.model.width))
    eps, heads = spec.model.layer_norm_eps, spec.model.heads // count
    shares = [block_of_rank(part, name, x, heads, eps)[0]() for part in parts]
    y = x + sum(shares) + state[f"{name}.attn.proj.bias"]
    shares = [block_of_rank(part, name, x, heads, eps)[1](y) for part in parts]
    y = y + sum(shares) + state[f"{name}.mlp.fc2.bias"]
    assert_close(y, encoders.block(state, name, x, spec.model), 1e-13)
    swapped = [part_of_state(state, splits(spec), 0, count)] * count
    wrong = x + sum(block_of_rank(part, name, x, heads, eps)[0]() for part in swapped)
    assert np.abs(wrong + state[f"{name}.attn.proj.bias"] - y).max() > 1e-3


@pytest.mark.parametrize("count", COUNTS)
def test_a_head_computed_by_parts_is_the_whole_one(count):
    """A pair of layers with the batch norm and the ReLU between them."""
    spec = spec_of("moco_v3_vit", count)
    state, plan = state_of(spec), parameters.parts(spec).predictor
    x = np.random.default_rng(2).standard_normal((8, spec.method.output_dim))
    pair = plan._replace(layers=plan.layers[:4])
    parts = [part_of_state(state, splits(spec), rank, count) for rank in range(count)]
    shares = [head(part, "student.predictor", x, pair, TRAINING) for part in parts]
    assert_close(sum(shares), head(state, "student.predictor", x, pair, TRAINING), 1e-13)
    back = joined_state(parts, splits(spec))  # with the running statistics of the step
    name = "student.predictor.1.running_var"
    assert_close(back[name], state[name], 1e-13)


def test_a_generator_and_a_classifier_computed_by_parts_are_the_whole_ones():
    spec, name = spec_of("moca_vit", 2), "student.dense_predictor"
    state, x = state_of(spec), np.random.default_rng(2).standard_normal((22, 32))
    parts = [part_of_state(state, splits(spec), rank, 2) for rank in range(2)]

    def by_rank(values):
        hidden = relu(linear(values, f"{name}.hidden", x))
        return hidden @ values[f"{name}.last.weight"].T

    assert_close(by_rank(parts[0]) + by_rank(parts[1]), by_rank(state), 1e-13)
    weight = np.random.default_rng(3).standard_normal((5, 32))
    halves = [INPUTS.part(weight, rank, 2) for rank in range(2)]
    shares = [INPUTS.part(x, rank, 2) @ half.T for rank, half in enumerate(halves)]
    assert_close(sum(shares), x @ weight.T, 1e-13)
    probe = {"method": {"name": "linear", "classes": 5, "rates": [1.0, 0.5]}}
    given = {**TINY["moco_v3_vit"], **probe, "train": {"steps": 1, "batch_size": 8}}
    assert splits(RunSpec.model_validate(given))["student.classifier.1.weight"] == INPUTS


# --------------------------------------------------------------------------------------- pipelines


@pytest.mark.parametrize(
    ("depth", "count", "sizes"), [(12, 4, [3] * 4), (12, 5, [3, 3, 2, 2, 2]), (3, 3, [1] * 3)]
)
def test_blocks_are_divided_evenly_and_the_first_stages_have_more(depth, count, sizes):
    blocks = blocks_of(depth, count)
    assert [len(stage) for stage in blocks] == sizes
    assert [block for stage in blocks for block in stage] == list(range(depth))


def test_each_tensor_has_a_stage():
    found = stages(tiny_spec(case="moca_vit", parallel={"pipeline": 2}))
    want = {
        "student.encoder.cls_token": 0,
        "teacher.encoder.patch_embed.proj.weight": 0,
        "student.encoder.blocks.1.mlp.fc1.weight": 0,
        "teacher.encoder.blocks.2.mlp.fc1.weight": 1,
        "student.encoder.norm.weight": 1,
        "student.decoder.blocks.0.attn.qkv.weight": 1,
        "student.decoder.pos_embed": 1,
        "memory.words": 1,
        "memory.pointer": 1,
    }
    assert {name: found[name] for name in want} == want


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("moco_v3", {"projector": 16, "predictor": 16}),
        ("moca", {"image_predictor": 32, "decoder": 24, "dense_predictor": 24}),
        ("linear", {"classifier.0": 5, "classifier.1": 5}),
        ("finetune", {"classifier": 5}),
    ],
)
def test_what_stands_for_the_networks_of_the_last_stage_has_their_width(name, wanted):
    assert widths(SPECS[name]) == wanted
