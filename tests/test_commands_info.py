"""What ``info -c`` says: counts, cost, schedule, chance level, in text and as JSON."""

import json
import math

import pytest
import yaml
from PIL import Image

from triptych.core import cli, config
from triptych.core.machine import environment
from triptych.core.optim.plan import Plan
from triptych.core.parameters.counts import flops, parameter_counts
from triptych.core.report.summary import render, schedule, summarize

PUBLISHED = {
    # recipe: all parameters, encoder, with a gradient, multiply-adds per image
    "moco_v3/vit_small": (84_266_752, 21_665_664, 42_815_104, 4_607_954_304),
    "moco_v3/vit_base": (215_678_464, 85_798_656, 108_150_016, 17_581_972_224),
    "moco_v3/vit_large": (652_781_568, 303_301_632, 326_454_272, 61_603_111_936),
    "moco_v3/resnet50_100ep": (68_012_160, 23_508_032, 35_058_752, 4_109_364_224),
    "moco_v2/resnet50": (55_933_312, 23_508_032, 27_966_656, 4_109_364_224),
    "moco_v1/resnet50": (47_540_608, 23_508_032, 23_770_304, 4_109_364_224),
}
ROUNDED = {
    "moco_v3/vit_small": ("84.27 M", "4.61 GFLOPs"),
    "moco_v3/vit_base": ("215.68 M", "17.58 GFLOPs"),
    "moco_v3/vit_large": ("652.78 M", "61.60 GFLOPs"),
    "moco_v3/resnet50_100ep": ("68.01 M", "4.11 GFLOPs"),
    "moco_v2/resnet50": ("55.93 M (55,933,312)", "4.11 GFLOPs"),
    "moco_v1/resnet50": ("47.54 M", "4.11 GFLOPs"),
}


@pytest.fixture
def info(capsys, tmp_path, monkeypatch):
    """Runs the command in an empty folder; gives status, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        status = cli.main(["info", *arguments])
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return run


@pytest.mark.parametrize("recipe", PUBLISHED)
def test_counts_are_the_published_integers(recipe):
    spec = config.load(recipe)
    counts = parameter_counts(spec)
    own = (counts.total, counts.encoder, counts.trainable, flops(spec))
    assert own == PUBLISHED[recipe]


@pytest.mark.parametrize(
    ("change", "gaps"),
    [
        # patch projection: 768 x 384 weights and 384 biases get a gradient
        ("model.freeze_patch_embed=false", (0, 0, 295_296, 0)),
        # one block: 12 D^2 + 13 D parameters; 12 N D^2 + 2 N^2 D + 2 N D 5 multiply-adds
        (
            "model.depth=13",
            (2 * 1_774_464, 1_774_464, 1_774_464, 197 * (1_769_472 + 2 * 197 * 384 + 3_840)),
        ),
        ("model.heads=6", (0, 0, 0, 0)),
        # a position has no gradient and comes twice; 1 + 28 x 28 of them instead of 1 + 14 x 14
        ("model.image_size=448", (2 * 588 * 384, 588 * 384, 0, None)),
        # the predictor's second layer has no norm with parameters
        ("method.predictor_last_norm=false", (0, 0, 0, 0)),
        ("method.output_dim=255", (-2 * 4096 - 2 * 4096, 0, -3 * 4096, 0)),
    ],
)
def test_counts_follow_the_spec(change, gaps):
    before, after = config.load("moco_v3/vit_small"), config.load("moco_v3/vit_small", [change])
    for name, gap in zip(("total", "encoder", "trainable"), gaps, strict=False):
        own = getattr(parameter_counts(after), name) - getattr(parameter_counts(before), name)
        assert own == gap, name
    if gaps[3] is not None:
        assert flops(after) - flops(before) == gaps[3]


def test_counts_of_the_convolutional_stem():
    totals = {"small": (82_170_208, 20_617_392), "base": (208_480_960, 82_199_904)}
    for size, (total, encoder) in totals.items():
        counts = parameter_counts(config.load(f"moco_v3/vit_conv_{size}"))
        assert (counts.total, counts.encoder) == (total, encoder)


def test_flops_of_a_small_resnet_by_hand():
    """ResNet-18 of width 2, images of 8 x 12 pixels, the small stem."""
    changes = ["model={name: resnet18, width: 2, stem: small, image_size: [8, 12], channels: 1}"]
    spec = config.load(
        "moco_v1/resnet50", [*changes, "data.channels=1", "augment.mean=[0.5]", "augment.std=[0.5]"]
    )
    first = 96 * (2 * 1 * 9 + 2 * 2)  # positions x (in x out x kernel + 2 per output)
    total = first + 4 * 96 * (2 * 2 * 9 + 2 * 2)
    for width, positions in ((4, 24), (8, 6), (16, 2)):
        half = width // 2
        total += positions * (half * width * 9 + 2 * width + half * width + 2 * width)
        total += 3 * positions * (width * width * 9 + 2 * width)
    assert flops(spec) == total


def test_flops_of_a_small_encoder_by_hand():
    spec = config.load("moco_v3/digits")
    tokens, width, depth = 17, spec.model.width, spec.model.depth
    block = tokens * width * (3 * width + width + 4 * width + 4 * width)  # qkv, proj, fc1, fc2
    block += 2 * tokens * tokens * width + 2 * 5 * tokens * width  # attention twice, two norms
    assert flops(spec) == 16 * 4 * 4 * width + depth * block + 5 * tokens * width


@pytest.mark.parametrize("recipe", PUBLISHED)
def test_the_text_holds_the_rounded_numbers(info, recipe):
    status, out, err = info("-c", recipe)
    assert (status, err) == (0, "")
    for number in ROUNDED[recipe]:
        assert number in out
    assert "student and teacher" in out and "running statistics not" in out
    assert "one image through one encoder" in out
    assert "data/imagenet/train" in out and "unknown: give --dataset-size N" in out
    assert "  random_resized_crop" not in out.split("view2")[0].split("view1")[0]
    # In view 2 of MoCo v3, and in the resolved spec.
    assert out.count("solarize") == (2 if "moco_v3" in recipe else 0)


def test_a_known_size_gives_steps(info):
    status, out, _ = info("-c", "moco_v3/vit_base", "--dataset-size", "1281167", "--json")
    found = json.loads(out)
    assert status == 0
    assert (found["steps_per_epoch"], found["total_steps"]) == (312, 93_600)
    assert found["chance"] == 4 * 0.2 * math.log(4096)
    plan = Plan(config.load("moco_v3/vit_base"), 312)
    assert 8 <= len(found["schedule"]) <= 12
    steps = [row["step"] for row in found["schedule"]]
    assert steps[0] == 0 and steps[-1] == 93_599 and 40 * 312 in steps and steps == sorted(steps)
    for row in found["schedule"]:
        hyper = plan.hyper(row["step"])
        assert (row["lr"], row["weight_decay"], row["ema"]) == (
            hyper.lr,
            hyper.weight_decay,
            hyper.ema,
        )
        assert row["epoch"] == row["step"] / 312
    peak = max(row["lr"] for row in found["schedule"])
    assert peak == pytest.approx(2.4e-3, rel=1e-12)


def test_an_unknown_size_gives_epochs(info):
    _, out, _ = info("-c", "moco_v3/vit_base", "--json")
    found = json.loads(out)
    assert (found["dataset_size"], found["steps_per_epoch"], found["total_steps"]) == (None,) * 3
    assert "data/imagenet/train" in found["dataset_problem"]
    known = Plan(config.load("moco_v3/vit_base"), 312)
    epochs = [row["epoch"] for row in found["schedule"]]
    assert epochs[0] == 0 and epochs[-1] == 299 and 40 in epochs
    for row in found["schedule"]:
        hyper = known.hyper(round(row["epoch"] * 312))
        assert row["step"] is None
        assert row["lr"] == pytest.approx(hyper.lr, rel=1e-12)
        assert row["ema"] == pytest.approx(hyper.ema, rel=1e-12)


@pytest.mark.parametrize(
    ("overrides", "rows"),
    [
        ((), True),
        (("optim.per=epoch",), True),
        (("optim.warmup_epochs=null", "optim.warmup_steps=7"), False),
        (("train.epochs=null", "train.steps=50", "optim.warmup_epochs=null"), True),
        (("train.epochs=null", "train.steps=50"), False),
        (
            ("train.epochs=null", "train.steps=50", "optim.warmup_epochs=null", "optim.per=epoch"),
            False,
        ),
    ],
)
def test_without_a_size_only_what_is_certain_is_shown(overrides, rows):
    found = schedule(config.load("moco_v3/vit_small", overrides), None)
    assert bool(found) == rows


def test_a_schedule_that_needs_the_size_says_so(info):
    _, out, _ = info(
        "-c", "moco_v3/vit_small", "-o", "optim.warmup_epochs=null", "optim.warmup_steps=7"
    )
    assert "schedule    unknown: it mixes epochs and steps" in out


def test_the_data_are_counted_where_they_are(info):
    _, out, _ = info("-c", "moco_v3/digits", "--json")
    found = json.loads(out)
    assert found["dataset_size"] == 1437
    assert found["steps_per_epoch"] == 1437 // found["batch_size"]
    assert found["total_steps"] == found["spec"]["train"]["steps"]
    assert found["dataset_problem"] is None


def test_a_folder_of_a_few_images(info, tmp_path):
    for i in range(5):
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.new("RGB", (9, 7), (i, 2, 3)).save(tmp_path / "images" / f"{i}.png")
    few = ("-o", "data.root=images", "train.batch_size=2")
    status, out, _ = info("-c", "moco_v3/vit_small", *few)
    assert status == 0
    assert "5 images" in out and "600 steps" in out
    status, out, err = info("-c", "moco_v3/vit_small", "-o", "data.root=images")
    assert (status, out) == (2, "")
    assert err == "error: train.batch_size: 4096: larger than the dataset of 5\n"


def test_the_resolved_spec_is_printed_and_loads(info, tmp_path):
    _, out, _ = info("-c", "moco_v3/digits", "-o", "train.stop_at=7", "augment.view1=[]")
    assert "stops after step 7" in out and "view1: no operation" in out
    resolved = out.partition("resolved spec\n")[2]
    (tmp_path / "spec.yaml").write_text(resolved)
    spec = config.load("moco_v3/digits", ["train.stop_at=7", "augment.view1=[]"])
    assert config.load(tmp_path / "spec.yaml") == spec
    _, out, _ = info("-c", "moco_v3/digits", "--json")
    again = config.load("moco_v3/digits")
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(json.loads(out)["spec"]))
    assert config.load(tmp_path / "spec.yaml") == again


def test_options_of_operations_are_listed(info):
    views = "augment.view1=[{op: rand_augment}, {op: random_erase, count: [1, 3]}]"
    _, out, _ = info("-c", "moco_v3/vit_small", "-o", views)
    assert "  p 0.5   rand_augment  operations 2, magnitude 9.0, deviation 0.5" in out
    assert "fill 124 116 104, translate 0.45" in out
    assert "count 1 to 3, fit retry" in out


def test_the_summary_is_plain_data():
    found = summarize(config.load("moco_v3/vit_large"), 10_000)
    assert json.loads(json.dumps(found)) == found
    assert render(json.loads(json.dumps(found))) == render(found)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "info: give env, weights, or -c with a file or one of: moca/"),
        (("env", "-c", "moco_v3/digits"), "info: give env, weights, or -c with a file"),
        (("envy",), "invalid choice: 'envy'"),
        (("-c", "nope.yaml"), "nope.yaml: no such file"),
        (("-c", "moco_v3/digits", "-o", "seed=x", "lr=1"), "-o seed=x: seed: 'x': expected an int"),
        (("-c", "moco_v3/digits", "--dataset-size", "0"), "'0': expected a number of images > 0"),
        (("-c", "moco_v3/digits", "--dataset-size", "x"), "'x': expected a number of images > 0"),
        (("-c", "moco_v3/digits", "--dataset-size", "9"), "larger than the dataset of 9"),
        (
            ("-c", "moco_v3/vit_small", "-o", "train.epochs=1"),
            "optim.warmup_epochs: a warm-up of 40 epochs is longer than the run of 1 epochs",
        ),
    ],
)
def test_bad_input_is_one_line_each_and_status_2(info, arguments, message):
    status, out, err = info(*arguments)
    assert (status, out) == (2, "")
    assert message in err
    assert all(line.startswith("error: ") for line in err.splitlines())


def test_env_is_wired(info, monkeypatch):

    monkeypatch.setattr(environment, "report", lambda names: {"backends": {}, "cores": 3})
    monkeypatch.setattr(environment, "render", lambda found: f"cores: {found['cores']}")
    assert info("env") == (0, "cores: 3\n", "")
    assert json.loads(info("env", "--json")[1]) == {"backends": {}, "cores": 3}


def test_env_shows_what_a_launcher_gave_to_each_process(info, monkeypatch):
    monkeypatch.setattr(environment, "report", lambda names: {"cores": 3})
    monkeypatch.setattr(environment, "render", lambda found: f"cores: {found['cores']}")
    given = {"WORLD_SIZE": "4", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "node7"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    _, out, _ = info("env")
    first, line = out.splitlines()
    assert first == "cores: 3" and line.startswith("launcher  rank 0 of 4, 0 of 4 on ")
    assert line.endswith(": WORLD_SIZE=4 RANK=0 LOCAL_RANK=0 MASTER_ADDR=node7")
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert info("env")[1].startswith("launcher  rank 3 of 4, 1 of 4 on ")
    assert json.loads(info("env", "--json")[1])["launcher"]["variables"]["RANK"] == "3"


def test_a_backend_may_be_named_as_for_the_other_commands(info, monkeypatch):
    status, out, _ = info("-c", "moco_v3/digits", "--backend", "paddle", "--json")
    assert status == 0 and json.loads(out)["spec"]["backend"] == "paddle"
    asked = []
    monkeypatch.setattr(environment, "_probe", lambda name, timeout: asked.append(name) or {})
    monkeypatch.setattr(environment, "render", lambda found: "")
    assert info("env", "--backend", "oneflow")[0] == 0 and asked == ["oneflow"]
    status, _, err = info("env", "--backend", "jax")
    assert status == 2 and "--backend: invalid choice: 'jax' (choose from 'torch'" in err
