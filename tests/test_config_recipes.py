"""Recipes of residual networks and queues against the published values and the golden ones."""

import json

import pytest
from support.golden_weights import GOLDEN, description

from triptych.core import config
from triptych.core.optim.plan import Plan
from triptych.core.parameters.counts import flops, parameter_counts

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
            "teacher_statistics": "own",
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


EVAL = json.loads((GOLDEN / "eval" / "eval_schedules.json").read_text())["recipes"]
BENCHMARKS = {
    "mm_moco_v3_vit_base_finetune": "vit-base-p16_mocov3-pre_8xb64-coslr-150e_in1k",
    "mm_moco_v3_vit_large_finetune": "vit-large-p16_mocov3-pre_8xb64-coslr-100e_in1k",
    "mm_moco_v3_vit_base_linear": "vit-base-p16_mocov3-pre_8xb128-linear-coslr-90e_in1k",
    "mm_moco_v3_vit_small_linear": "vit-small-p16_mocov3-pre_8xb128-linear-coslr-90e_in1k",
    "mm_moco_v3_resnet50_linear": "resnet50_mocov3-100e-pre_8xb128-linear-coslr-90e_in1k",
    "mm_moco_v2_resnet50_linear": "resnet50_mocov2-pre_8xb32-linear-steplr-100e_in1k",
}


@pytest.mark.parametrize("golden", BENCHMARKS)
def test_benchmark_recipes_hold_mmpretrains_values(golden):
    spec, given = config.load(BENCHMARKS[golden]), EVAL[golden]
    optimizer, clip = given["optimizer"], given["clip_grad"]
    assert (spec.train.epochs, spec.train.batch_size) == (given["epochs"], given["global_batch"])
    assert spec.train.steps_per_epoch(1_281_167) == given["iters_per_epoch"]
    assert spec.optim.name == optimizer["type"].lower()
    assert Plan(spec, given["iters_per_epoch"]).peak_lr == optimizer["lr"]
    assert spec.optim.weight_decay == optimizer["weight_decay"]
    assert spec.optim.clip_norm == (clip["max_norm"] if clip else None)
    if spec.optim.name == "adamw":
        assert list(spec.optim.betas) == optimizer["betas"]
        assert (spec.optim.eps, spec.optim.layer_decay) == (optimizer["eps"], 1.0)
    else:
        assert spec.optim.momentum == optimizer["momentum"]


@pytest.mark.parametrize(
    ("recipe", "parameters", "encoder_flops"),
    [
        ("moco_v2/resnet50_linear", 25_557_032, 4_109_364_224),
        ("moco_v3/resnet50_100ep_linear", 25_557_032, 4_109_364_224),
        ("moco_v3/vit_small_linear", 22_050_664, 4_607_954_304),
        ("moco_v3/vit_base_linear", 86_567_656, 17_581_972_224),
        ("moco_v3/vit_base_finetune", 86_567_656, 17_581_972_224),
        ("moco_v3/vit_base_finetune_mmpretrain", 86_567_656, 17_581_972_224),
        ("moco_v3/vit_large_finetune_mmpretrain", 304_326_632, 61_603_111_936),
        ("moca/v1_0_vit_base_finetune", 86_567_656, 17_581_972_224),
    ],
)
def test_benchmark_recipes_have_the_published_sizes(recipe, parameters, encoder_flops):
    spec = config.load(recipe)
    assert (parameter_counts(spec).total, flops(spec)) == (parameters, encoder_flops)


def test_mocas_probe_has_the_published_grid():
    spec = config.load("moca/v1_0_vit_base_linear")
    rates = [spec.optim.lr * rate * spec.train.batch_size / 256 for rate in spec.method.rates]
    assert rates == pytest.approx(EVAL["moca_linear"]["lrs"], rel=1e-12)
    assert (spec.method.pooling, spec.method.blocks, spec.method.head_std) == ("both", 1, 0.01)


@pytest.mark.parametrize(
    ("name", "classes", "decay", "mixup", "cutmix", "drop_path"),
    [
        ("cifar10", 10, 0.1, 0.8, 1.0, 0.1),
        ("cifar100", 100, 0.1, 0.5, 1.0, 0.1),
        ("flowers", 102, 0.3, 0.0, 0.0, 0.1),
        ("pets", 37, 0.1, 0.8, 0.0, 0.0),
    ],
)
def test_transfer_recipes_hold_the_published_values(name, classes, decay, mixup, cutmix, drop_path):
    spec = config.load(f"moco_v3/transfer/{name}")
    method = spec.method
    assert (method.classes, spec.optim.weight_decay, method.drop_path) == (
        classes,
        decay,
        drop_path,
    )
    assert (method.mixing.mixup, method.mixing.cutmix, method.mixing.smoothing) == (
        mixup,
        cutmix,
        0.1,
    )
    assert Plan(spec, 48).peak_lr == pytest.approx(6e-4)
    assert spec.augment.view1[0].scale == (0.05, 1.0)


@pytest.mark.parametrize("method", ["moco_v1", "moco_v2", "moco_v3", "moca"])
@pytest.mark.parametrize("protocol", ["linear", "finetune"])
def test_digits_are_probed_and_fine_tuned_with_the_encoder_they_were_trained_with(method, protocol):
    pretraining, other = config.load(f"{method}/digits"), config.load(f"{method}/digits_{protocol}")
    free = {"freeze_positions", "fc_norm"}
    assert other.model.model_dump(exclude=free) == pretraining.model.model_dump(exclude=free)
    assert other.data == pretraining.data
    assert other.augment.eval_resize == pretraining.augment.eval_resize


@pytest.mark.parametrize("recipe", config.recipes())
def test_recipes_take_the_precision_of_the_published_runs(recipe):
    """float16 of the authors is bfloat16 here; what they trained in float32 stays there."""
    text = config.recipes()[recipe].read_text()
    spec = config.load(recipe)
    if "trained in mixed precision" in text:
        assert spec.precision == "bfloat16"
        assert "-o precision=float32 for parity, OneFlow and Paddle" in text
    else:
        assert spec.precision == "float32" or recipe in ("moca/vit_small", "moca/vit_large")
