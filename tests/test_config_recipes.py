"""Recipes of residual networks and queues against the published values and the golden ones."""

import json

import pytest
from support.golden_weights import GOLDEN, description

from triptych.core import config

PIPELINES = json.loads((GOLDEN / "augmentation.json").read_text())["pipelines"]
VIEWS = {
    ("moco_v1/resnet50", "view1"): "moco_v1_pretrain_both_views",
    ("moco_v1/resnet50", "view2"): "moco_v1_pretrain_both_views",
    ("moco_v2/resnet50", "view1"): "moco_v2_pretrain_both_views",
    ("moco_v2/resnet50_800ep", "view2"): "moco_v2_pretrain_both_views",
    ("moco_v3/resnet50_100ep", "view1"): "moco_v3_resnet50_crop_min_0.2_view1",
    ("moco_v3/resnet50_1000ep", "view2"): "moco_v3_resnet50_crop_min_0.2_view2",
    ("moco_v3/vit_conv_small", "view1"): "moco_v3_vit_default_crop_min_0.08_view1",
    ("moco_v3/vit_conv_base", "view2"): "moco_v3_vit_default_crop_min_0.08_view2",
    ("moca/v1_0_vit_base", "view1"): "moca_pretrain_view1",
    ("moca/v0_9_vit_base", "view2"): "moca_pretrain_view2",
}


def golden_ops(pipeline):
    """(name, probability, parameters) of each operation, and the normalisation."""
    found, normalize = [], None
    for op in PIPELINES[pipeline]["ops"]:
        p = op.get("p", 1.0)
        if op["op"] == "RandomApply":
            (op,) = op["ops"]
        name = op["op"]
        if name == "RandomResizedCrop":
            found.append((name, p, op["scale"], op["ratio"], op["interpolation"]))
        elif name == "ColorJitter":
            bounds = [round(op[key][1] - 1, 6) for key in ("brightness", "contrast", "saturation")]
            found.append((name, p, *bounds, op["hue"][1]))
        elif name == "GaussianBlur":
            found.append((name, p, op["radius_uniform"]))
        elif name in ("Solarize", "Solarization"):
            found.append(("Solarize", p, op["threshold"]))
        elif name == "Normalize":
            normalize = (op["mean"], op["std"])
        elif name != "ToTensor":
            found.append((name, p))
    return found, normalize


def own_ops(spec, view):
    """The same of a recipe."""
    found = []
    for op in getattr(spec.augment, view):
        if op.op == "random_resized_crop":
            crop = (list(op.scale), list(op.ratio), op.interpolation)
            found.append(("RandomResizedCrop", op.p, *crop))
        elif op.op == "color_jitter":
            strengths = (op.brightness, op.contrast, op.saturation, op.hue)
            found.append(("ColorJitter", op.p, *strengths))
        elif op.op == "gaussian_blur":
            found.append(("GaussianBlur", op.p, list(op.sigma)))
        elif op.op == "solarize":
            found.append(("Solarize", op.p, op.threshold))
        else:
            names = {"grayscale": "RandomGrayscale", "horizontal_flip": "RandomHorizontalFlip"}
            found.append((names[op.op], op.p))
    return found, (list(spec.augment.mean), list(spec.augment.std))


@pytest.mark.parametrize(("recipe", "view"), VIEWS)
def test_views_are_the_golden_pipelines(recipe, view):
    assert own_ops(config.load(recipe), view) == golden_ops(VIEWS[recipe, view])


def test_another_pipeline_is_seen():
    spec = config.load("moco_v2/resnet50")
    for pipeline in set(VIEWS.values()) - {"moco_v2_pretrain_both_views"}:
        assert own_ops(spec, "view1") != golden_ops(pipeline)


@pytest.mark.parametrize("method", ["moco_v1", "moco_v2"])
def test_paddles_variant_differs_where_it_should(method):
    official, paddle = (config.load(f"{method}/resnet50{end}") for end in ("", "_paddle"))
    for view in ("view1", "view2"):
        ops, (mean, std) = own_ops(paddle, view)
        want, _ = own_ops(official, view)
        assert ops[1:] == want[1:]
        assert ops[0] == (*want[0][:-1], "bicubic")
        assert getattr(paddle.augment, view)[0].sampler == "fitted"
        assert getattr(official.augment, view)[0].sampler == "inception"
        assert (mean, std) == ([0.5] * 3, [0.5] * 3)
    changed = {"model": {"init"}, "method": {"head_init"}}
    for section in ("model", "method", "optim", "train", "batch_norm"):
        ours, theirs = (getattr(s, section).model_dump() for s in (official, paddle))
        different = {key for key in ours if ours[key] != theirs[key]}
        assert different == changed.get(section, set())


def test_queue_recipes_hold_the_published_values():
    for method, temperature, epochs in (("v1", 0.07, 200), ("v2", 0.2, 200), ("v2", 0.2, 800)):
        name = f"moco_{method}/resnet50{'_800ep' if epochs == 800 else ''}"
        spec = config.load(name)
        assert spec.method.model_dump(exclude={"name", "hidden_dim"}) == {
            "temperature": temperature,
            "output_dim": 128,
            "queue_size": 65536,
            "momentum": 0.999,
            "momentum_schedule": "constant",
            "head_init": "torch",
        }
        assert (spec.train.epochs, spec.train.batch_size, spec.model.name) == (
            epochs,
            256,
            "resnet50",
        )
        # Eight devices of 32 images.
        assert spec.batch_norm.virtual_ranks == 8
        optim = spec.optim
        assert (optim.name, optim.lr, optim.momentum, optim.weight_decay, optim.per) == (
            "sgd",
            0.03,
            0.9,
            1e-4,
            "epoch",
        )


MOCA = {
    "words": 4096,
    "new_words": 32,
    "word_ranks": 8,
    "words_from": "first_rank",
    "kappa": 3.0,
    "inverse_delta": 10.0,
    "border": 2,
    "early_layer": 4,
    "mask_ratios": (0.55, 0.75),
    "decoder_ratios": (0.35, 0.55),
    "pooling": "mean",
    "predictor_ratio": 2.0,
    "decoder_width": 512,
    "decoder_depth": 2,
    "decoder_heads": 16,
    "image_weight": 0.5,
    "dense_weight": 0.5,
    "momentum_schedule": "cosine",
}
MOCA_OPTIM = {
    "name": "adamw",
    "lr": 1.5e-4,
    "scale_lr_by": 256,
    "generator_lr": 1e-4,
    "weight_decay": 0.05,
    "decay_on": "matrices",
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "clip_norm": 0.1,
    "schedule": "cosine",
    "per": "step",
    "lr_epochs_mul": 1.25,
    "warmup_epochs": 30,
}


@pytest.mark.parametrize(
    ("version", "momentum", "decay_end"), [("v0_9", 0.99, None), ("v1_0", 0.994, 0.2)]
)
def test_moca_recipes_hold_the_published_values(version, momentum, decay_end):
    spec = config.load(f"moca/{version}_vit_base")
    assert spec.method.model_dump() == {**MOCA, "name": "moca", "momentum": momentum}
    optim = spec.optim.model_dump()
    assert {key: optim[key] for key in MOCA_OPTIM} == MOCA_OPTIM
    assert optim["weight_decay_end"] == decay_end
    assert (spec.train.epochs, spec.train.batch_size) == (200, 2048)
    model = spec.model
    assert (model.name, model.size, model.patch_size) == ("vit_base", (224, 224), 16)
    assert (model.init, model.freeze_patch_embed) == ("moca", False)


@pytest.mark.parametrize(
    ("epochs", "peak", "decay", "momentum", "zero_init"),
    [
        (100, 9.6, 1e-6, 0.99, True),
        (300, 4.8, 1e-6, 0.99, True),
        (800, 4.8, 1.5e-6, 0.996, False),
        (1000, 4.8, 1.5e-6, 0.996, True),
    ],
)
def test_resnet_recipes_hold_the_published_values(epochs, peak, decay, momentum, zero_init):
    spec = config.load(f"moco_v3/resnet50_{epochs}ep")
    optim, method = spec.optim, spec.method
    assert optim.lr * 4096 / 256 == pytest.approx(peak)
    assert (spec.train.epochs, spec.train.batch_size, optim.warmup_epochs) == (epochs, 4096, 10)
    assert (optim.name, optim.weight_decay, optim.momentum, optim.trust_coefficient) == (
        "lars",
        decay,
        0.9,
        0.001,
    )
    assert (method.temperature, method.momentum, method.hidden_dim, method.output_dim) == (
        1.0,
        momentum,
        4096,
        256,
    )
    assert (method.projector_layers, method.predictor_layers, method.predictor_last_norm) == (
        2,
        2,
        False,
    )
    assert spec.model.zero_init_residual is zero_init
    assert spec.batch_norm.virtual_ranks == 1  # synchronised in the original


GOLDEN_KEYS = {
    "arch": lambda spec: spec.model.name,
    "mlp": lambda spec: spec.method.name == "moco_v2",
    "dim": lambda spec: spec.method.output_dim,
    "mlp_dim": lambda spec: spec.method.hidden_dim,
    "K": lambda spec: spec.method.queue_size,
    "m": lambda spec: spec.method.momentum,
    "T": lambda spec: spec.method.temperature,
    "N": lambda spec: spec.train.batch_size,
    "img": lambda spec: spec.model.image_size,
    "steps": lambda spec: spec.train.steps,
    "lr": lambda spec: spec.optim.lr,
    "wd": lambda spec: spec.optim.weight_decay,
    "opt": lambda spec: spec.optim.name,
    "optimizer": lambda spec: spec.optim.name,
    "sgd_momentum": lambda spec: spec.optim.momentum,
    "lars_momentum": lambda spec: spec.optim.momentum,
    "trust_coefficient": lambda spec: spec.optim.trust_coefficient,
    "embed_dim": lambda spec: spec.model.width,
    "depth": lambda spec: spec.model.depth,
    "heads": lambda spec: spec.model.heads,
    "mlp_ratio": lambda spec: spec.model.mlp_ratio,
    "ln_eps": lambda spec: spec.model.layer_norm_eps,
    "stop_grad_conv1": lambda spec: spec.model.freeze_patch_embed,
    "stem": lambda spec: spec.model.stem,
    "betas": lambda spec: list(spec.optim.betas),
    "eps": lambda spec: spec.optim.eps,
}
FIXED = {
    "nesterov": False,
    "dampening": 0,
    "decoupled_wd": True,
    "wd_and_trust_on": "ndim>1",
}


@pytest.mark.parametrize(
    "case", ["moco_v1_resnet18", "moco_v2_resnet50", "moco_v3_resnet50", "moco_v3_vit_conv_tiny"]
)
def test_golden_specs_equal_the_golden_configuration(case):
    spec = config.load(GOLDEN / "specs" / f"{case}.yaml")
    for key, want in description(case)["config"].items():
        if key == "wd_on":
            assert want.startswith("every trainable tensor")
        elif key in FIXED:
            assert want == FIXED[key]
        else:
            assert GOLDEN_KEYS[key](spec) == want, key
    optim = spec.optim
    constant = (optim.schedule, optim.warmup_steps, optim.warmup_epochs, optim.scale_lr_by)
    assert constant == ("constant", None, None, None)
    assert (spec.method.momentum_schedule, spec.batch_norm.virtual_ranks) == ("constant", 1)
