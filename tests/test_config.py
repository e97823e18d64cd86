"""Specs: every kind of mistake has its line, inheritance, round trips, hostile files."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from triptych.core import config
from triptych.core.config import schema as schemas
from triptych.core.config.spec import RunSpec
from triptych.core.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"
SMALL = """\
model:
  name: vit
  width: 64
  depth: 2
  heads: 4
method: {name: moco_v3}
train:
  steps: 3
augment:
  mean: [0.5, 0.5, 0.5]
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes files into the folder that the test runs in."""
    monkeypatch.chdir(tmp_path)

    def to(name: str, content: str | bytes) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return name

    return to


def complaints(path: str | Path, *overrides: str) -> list[str]:
    """The lines that loading ends with."""
    with pytest.raises(UserError) as caught:
        config.load(path, overrides)
    return str(caught.value).split("\n")


# ------------------------------------------------------------------------------- what is right


def test_a_small_spec(write):
    spec = config.load(write("a.yaml", SMALL))
    assert (spec.model.width, spec.method.name, spec.train.steps) == (64, "moco_v3", 3)
    assert spec.optim.betas == (0.9, 0.999)


@pytest.mark.parametrize("name", config.recipes())
def test_recipes_load_and_return_from_their_dump(name, write):
    spec = config.load(name)
    assert config.load(write("dump.yaml", config.dump(spec))) == spec
    assert config.load(config.recipes()[name]) == spec


def test_the_recipes_are_these():
    assert set(config.recipes()) >= {
        "moco_v3/digits",
        "moco_v3/vit_small",
        "moco_v3/vit_base",
        "moco_v3/vit_large",
    }
    assert not any("_base_" in name for name in config.recipes())


@pytest.mark.parametrize(
    "root", ["yes", "1e3", "0o17", "null", "2020-01-01", "1_0", "", "~", "é\n"]
)
def test_dump_keeps_text_text(write, root):
    given = {**config.load(write("a.yaml", SMALL)).model_dump()}
    given["data"] = {**given["data"], "root": root}
    spec = RunSpec.model_validate(given)
    assert config.load(write("dump.yaml", config.dump(spec))) == spec


@given(st.floats(1e-300, 1e300), st.integers(0, 2**63 - 1))
@settings(
    deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50
)
def test_dump_keeps_every_bit_of_a_number(write, lr, seed):
    path = write("a.yaml", SMALL)
    spec = config.load(path, [f"optim.lr={lr!r}", f"seed={seed}"])
    assert (spec.optim.lr, spec.seed) == (lr, seed)
    assert config.load(write("dump.yaml", config.dump(spec))) == spec


@pytest.mark.parametrize("case", ["moco_v3_vit_tiny", "moco_v3_vit_s16_224"])
def test_golden_specs_equal_the_golden_configuration(case):
    spec = config.load(GOLDEN / "specs" / f"{case}.yaml")
    want = json.loads((GOLDEN / f"{case}.json").read_text())["config"]
    model, method, optim = spec.model, spec.method, spec.optim
    own = {
        "dim": method.output_dim,
        "mlp_dim": method.hidden_dim,
        "T": method.temperature,
        "N": spec.train.batch_size,
        "img": model.image_size,
        "steps": spec.train.steps,
        "opt": optim.name,
        "lr": optim.lr,
        "wd": optim.weight_decay,
        "m": method.momentum,
        "embed_dim": model.width,
        "depth": model.depth,
        "heads": model.heads,
        "patch": model.patch_size,
        "mlp_ratio": model.mlp_ratio,
        "ln_eps": model.layer_norm_eps,
        "stop_grad_conv1": model.freeze_patch_embed,
        "stem": model.stem,
        "betas": list(optim.betas),
        "eps": optim.eps,
        "decoupled_wd": True,
        "wd_on": "every trainable tensor",
    }
    assert own == want
    constant = (optim.schedule, optim.warmup_steps, optim.warmup_epochs, optim.scale_lr_by)
    assert constant == ("constant", None, None, None)
    assert (method.momentum_schedule, optim.weight_decay_end) == ("constant", None)


# ---------------------------------------------------------------------- inheritance and overrides


def test_mappings_merge_and_lists_replace(write):
    write("one.yaml", SMALL + "optim: {lr: 1e-3, eps: 1e-6, betas: [0.8, 0.9]}\nseed: 1\n")
    write("two.yaml", "optim: {lr: 2e-3}\nevaluate: {per_class: [1, 2, 3]}\n")
    spec = config.load(
        write("a.yaml", "_base_: [one.yaml, two.yaml]\nevaluate: {per_class: [5]}\nseed: 2\n")
    )
    # two.yaml wins over one.yaml, the file itself over both.
    assert (spec.optim.lr, spec.optim.eps, spec.optim.betas) == (2e-3, 1e-6, (0.8, 0.9))
    assert (spec.evaluate.per_class, spec.seed) == ((5,), 2)


def test_bases_are_relative_to_the_file_that_names_them(write):
    write("deep/shared/small.yaml", SMALL)
    write("deep/middle.yaml", "_base_: shared/small.yaml\nseed: 5\n")
    spec = config.load(write("a.yaml", "_base_: deep/middle.yaml\n"))
    assert (spec.seed, spec.model.depth) == (5, 2)


def test_a_recipe_is_a_base_wherever_one_is(write):
    spec = config.load(write("a.yaml", "_base_: moco_v3/digits\ntrain: {batch_size: 32}\n"))
    assert spec == config.load("moco_v3/digits", ["train.batch_size=32"])


def test_two_bases_may_share_a_base(write):
    write("small.yaml", SMALL)
    write("one.yaml", "_base_: small.yaml\nseed: 1\n")
    write("two.yaml", "_base_: small.yaml\nlog: {every: 7}\n")
    spec = config.load(write("a.yaml", "_base_: [one.yaml, two.yaml]\n"))
    assert (spec.seed, spec.log.every) == (1, 7)


def test_many_shared_bases_take_no_time(write):
    write("f0.yaml", SMALL)
    for i in range(1, 18):
        write(f"f{i}.yaml", f"_base_: [{', '.join([f'f{i - 1}.yaml'] * 9)}]\nseed: {i}\n")
    assert config.load("f17.yaml").seed == 17


def test_overrides_are_the_last_layer(write):
    path = write("a.yaml", SMALL)
    spec = config.load(
        path,
        [
            "optim.lr=1e-3",
            "optim.scale_lr_by=null",
            "optim={eps: 1e-7}",
            "data.root=a=b",
            "model.image_size=[32, 48]",
            "augment.view1=[{op: solarize}, {op: grayscale}]",
            "augment.view1.0.threshold=99",
            "seed=1",
            "seed=2",
        ],
    )
    assert (spec.optim.lr, spec.optim.scale_lr_by, spec.optim.eps) == (1e-3, None, 1e-7)
    assert (spec.data.root, spec.model.size, spec.seed) == ("a=b", (32, 48), 2)
    assert [op.op for op in spec.augment.view1] == ["solarize", "grayscale"]
    assert spec.augment.view1[0].threshold == 99


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("1E5", 1e5),
        (".5", 0.5),
        ("5.", 5.0),
        ("-0.25", -0.25),
        ("12", 12.0),
        ("010", 10.0),
        ("0x10", 16.0),
        ("0o17", 15.0),
        ("1:30", None),
        ("1_000", None),
        ("1e", None),
        ("'1'", None),
        ("yes", None),
        ("true", None),
    ],
)
def test_numbers_are_those_of_yaml_1_2(write, text, value):
    path = write("a.yaml", SMALL.replace("[0.5, 0.5, 0.5]", f"[{text}]"))
    if value is None:
        assert complaints(path)[0].startswith("a.yaml:10: augment.mean.0: ")
    else:
        assert config.load(path).augment.mean == (value,)


@pytest.mark.parametrize("text", ["no", "off", "y", "NO", "1", "null", "'true'"])
def test_only_true_and_false_are_true_and_false(write, text):
    path = write("a.yaml", SMALL)
    assert "expected true or false" in complaints(path, f"log.tensorboard={text}")[0]
    assert config.load(path, ["log.tensorboard=False"]).log.tensorboard is False


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats() | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=5,
    ),
    st.sampled_from(["seed", "optim.lr", "data.root", "model", "augment.view1", "x.y", "train"]),
)
@settings(
    deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150
)
def test_any_override_is_a_value_or_an_error(write, value, key):
    path = write("a.yaml", SMALL)
    try:
        spec = config.load(path, [f"{key}={json.dumps(value)}"])
    except UserError as error:
        assert all("-o " in line or line.startswith("a.yaml") for line in str(error).split("\n"))
        assert str(error).isprintable() or "\n" in str(error)
    else:
        assert config.load(write("dump.yaml", config.dump(spec))) == spec


@given(st.text(max_size=30))
@example("a" * 5000 + "=1")
@example(".".join("a" * 3000) + "=1")
@example("train.steps=!!python/object/apply:os.system [false]")
@example("seed=0x" + "f" * 9999)
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_after_o_is_an_error_or_changes_nothing(write, text):
    path = write("a.yaml", SMALL)
    with pytest.raises(UserError) as caught:
        config.load(path, [text])
    assert str(caught.value).startswith("-o ")


# ------------------------------------------------------------------------------ what is wrong


WRONG = [
    # A value of the wrong type or out of bounds.
    ("optim.lr=fast", "optim.lr: 'fast': expected a number > 0"),
    ("optim.lr=true", "optim.lr: true: expected a number > 0"),
    ("optim.lr=0", "optim.lr: 0: expected a number > 0"),
    ("optim.lr=-1e-3", "optim.lr: -0.001: expected a number > 0"),
    ("optim.lr=.nan", "optim.lr: .nan: expected a finite number > 0"),
    ("optim.lr=.inf", "optim.lr: .inf: expected a finite number > 0"),
    ("optim.lr=1e999", "optim.lr: .inf: expected a finite number > 0"),
    ("optim.weight_decay=-.inf", "optim.weight_decay: -.inf: expected a finite number >= 0"),
    ("optim.lr=", "optim.lr: null: expected a number > 0"),
    ("optim.clip_norm=-1", "optim.clip_norm: -1: expected a number > 0 or null"),
    ("method.momentum=1.5", "method.momentum: 1.5: expected a number >= 0 and <= 1"),
    ("train.steps=1.5", "train.steps: 1.5: expected an integer > 0 or null"),
    ("train.batch_size=-8", "train.batch_size: -8: expected an integer > 0"),
    ("seed=-1", "seed: -1: expected an integer >= 0 and < 9223372036854775808"),
    ("train.accumulate=2", "train.accumulate: 2: expected 1"),
    ("parallel.data=true", "parallel.data: true: expected 1"),
    ("data.channels=true", "data.channels: true: expected an integer >= 1 and <= 4"),
    ("data.root=3", "data.root: 3: expected text or null"),
    ("threads=0", "threads: 0: expected an integer > 0 or auto"),
    ("model.image_size=[32]", "model.image_size: [32]: expected an integer > 0 or a list of 2"),
    ("model.image_size=[3, a]", "model.image_size: [3, 'a']: expected an integer > 0 or a list"),
    ("optim.betas=[0.9]", "optim.betas: [0.9]: expected a list of 2, each a number >= 0 and < 1"),
    ("optim.betas=[.nan, 0.9]", "optim.betas.0: .nan: expected a finite number >= 0 and < 1"),
    ("optim.betas=[0.9, 1.0]", "optim.betas.1: 1.0: expected a number >= 0 and < 1"),
    ("augment.mean=3", "augment.mean: 3: expected a list, each a number"),
    ("log=3", "log: 3: expected a mapping"),
    ("log=", "log: null: expected a mapping"),
    ("device=gpu", "device: 'gpu': expected auto, cpu, cuda or cuda:N"),
    ("device=cuda:x", "device: 'cuda:x': expected auto, cpu, cuda or cuda:N"),
    # A choice: its values are listed, and the nearest is named.
    (
        "data.name=digit",
        "data.name: 'digit': expected one of digits, image_folder, image_list, cifar10 "
        "(did you mean 'digits'?)",
    ),
    ("backend=pytorch", "backend: 'pytorch': expected one of torch, oneflow, paddle or null (did"),
    ("precision=half", "precision: 'half': expected one of float32, float64, bfloat16, float16"),
    ("method.name=moca", "method.name: 'moca': expected moco_v3"),
    ("model.name=vit_smal", "model.name: 'vit_smal': expected one of vit, vit_tiny, vit_small"),
    ("model.name=[a]", "model.name: ['a']: expected one of vit"),
    # An unknown key, with the nearest one, or the one of this name in another section.
    ("optim.lrr=1", "optim.lrr: unknown key (did you mean 'lr'?)"),
    ("optm.lr=1", "optm: unknown key (did you mean 'optim'?)"),
    ("lr=1", "lr: unknown key (did you mean 'optim.lr'?)"),
    ("batch_size=8", "batch_size: unknown key (did you mean 'train.batch_size'?)"),
    ("log.zzz=1", "log.zzz: unknown key; expected one of every, tensorboard"),
    ("_base_=x.yaml", "_base_: unknown key"),
    # Operations of a view.
    ("augment.view1=[{op: blur}]", "augment.view1.0.op: 'blur': expected one of color_jitter"),
    ("augment.view1=[{p: 1.0}]", "augment.view1.0.op: missing: expected one of color_jitter"),
    ("augment.view2=[7]", "augment.view2.0: 7: expected a mapping"),
    (
        "augment.view1=[{op: solarize, threshhold: 3}]",
        "augment.view1.0.threshhold: unknown key (did you mean 'threshold'?)",
    ),
    ("augment.view1=[{op: solarize, p: 2}]", "augment.view1.0.p: 2: expected a number >= 0 and"),
    (
        "augment.view1=[{op: gaussian_blur, sigma: [2, 1]}]",
        "augment.view1.0.sigma: [2, 1]: expected [low, high] with low <= high",
    ),
    (
        "augment.view1=[{op: random_resized_crop, scale: [0, 1]}]",
        "augment.view1.0.scale.0: 0: expected a number > 0 and <= 1",
    ),
    ("augment.mean.3=1", "no item '3' in a list of 3"),
    ("augment.mean.x=1", "no item 'x' in a list of 3"),
    # Keys that contradict each other.
    ("model.heads=5", "model.heads: width 64 is not divisible by heads 5"),
    ("model.image_size=100", "model.image_size: image size 100 is not divisible by patch_size 16"),
    ("train.epochs=5", "train.steps: train.epochs is 5 and train.steps 3: set one of them"),
    ("train.steps=null", "train.steps: give exactly one of train.epochs and train.steps"),
    ("train.batch_size=1", "train.batch_size: batch norm needs at least 2 images"),
    ("data.channels=1", "model.channels: data.channels is 1, model.channels 3: they must be equal"),
    ("augment.mean=[0.1, 0.2]", "augment.mean: 2 values for 3 channels: give one, or one each"),
    ("augment.std=[]", "augment.std: 0 values for 3 channels"),
    (
        "optim.warmup_steps=4",
        "optim.warmup_steps: a warm-up of 4 steps is longer than the run of 3",
    ),
    ("data.name=image_folder", "data.root: data.name image_folder needs data.root"),
    ("data.name=image_list", "data.list: data.name image_list needs data.list"),
    # What is no override.
    ("train", "expected KEY=VALUE"),
    ("=3", "expected KEY=VALUE"),
    ("a..b=3", "expected KEY=VALUE"),
    ("optim.betas=[", "not YAML"),
    ("seed=a: b: c", "not YAML"),
    ("seed=1\n---\n2", "not YAML"),
    ("seed=!!python/name:os.system x", "tag !!python/name:os.system is refused"),
]


@pytest.mark.parametrize(("override", "message"), WRONG)
def test_a_wrong_override_has_its_line(write, override, message):
    (line,) = complaints(write("a.yaml", SMALL), override)
    assert message in line
    assert line.startswith((f"-o {override.splitlines()[0]}", "-o '", "a.yaml:"))


@pytest.mark.parametrize(
    ("change", "line", "message"),
    [
        (("  width: 64", "  widht: 64"), 3, "model.widht: unknown key (did you mean 'width'?)"),
        (("  width: 64\n", ""), 1, "model.width: missing: expected an integer > 0"),
        (("width: 64", "width: .nan"), 3, "model.width: .nan: expected an integer > 0"),
        (("  heads: 4", "  heads: 5"), 5, "model.heads: width 64 is not divisible by heads 5"),
        (("width: 64", "width: 66"), 3, "model.width: width 66 is not divisible by 4"),
        (("  steps: 3", "  steps: three"), 8, "train.steps: 'three': expected an integer > 0"),
        (("method: {name: moco_v3}\n", ""), 1, "method: missing: expected a mapping"),
        (("{name: moco_v3}", "{}"), 6, "method.name: missing: expected moco_v3"),
        (("{name: moco_v3}", "{name: moco_v3, name: b}"), 6, "method.name: duplicate key, first"),
        (("  steps: 3", "  3: steps\n  steps: 3"), 8, "train: a key is not text"),
        (("  steps: 3", "  ? [a]\n  : 3\n  steps: 3"), 8, "train: a key is not text"),
        (("  steps: 3", "  !!int steps: 3"), 8, "train: a key is not text"),
        (("steps: 3", "steps: !!int x"), 8, "train.steps: 'x' is not of the kind int"),
        (("steps: 3", "steps: !!timestamp 2020-01-01"), 8, "train.steps: tag !!timestamp is refu"),
        (("steps: 3", "steps: !foo 3"), 8, "train.steps: tag !foo is refused"),
        (("steps: 3", "steps: !!set {a}"), 8, "train.steps: tag !!set is refused"),
        (("  steps: 3", "\tsteps: 3"), 8, "not YAML"),
        (("  steps: 3", "  steps: [3"), 9, "not YAML"),
        (("  steps: 3", "steps 3"), 9, "not YAML"),
        (("  steps: 3", "  steps: 3\n---\nseed: 1"), 9, "not YAML: expected a single document"),
        (("  steps: 3", "  steps: 3 \x00"), 8, "not YAML: character 0x0000"),
        (("  steps: 3", "  steps: *three"), 8, "not YAML: found undefined alias"),
        (("  steps: 3", "  steps: &a [*a]"), 8, "links (*name) make it endless"),
    ],
)
def test_a_wrong_file_has_its_line(write, change, line, message):
    lines = complaints(write("a.yaml", SMALL.replace(*change)))
    assert any(text.startswith(f"a.yaml:{line}: ") and message in text for text in lines), lines


def test_all_mistakes_are_told_at_once(write):
    write("base.yaml", "optim:\n  lr: fast\n  epz: 1\nlog: {every: 0}\n")
    path = write(
        "a.yaml", "_base_: base.yaml\n" + SMALL.replace("64", "-64") + "seed: x\nseed: 1\n"
    )
    lines = complaints(path, "train.steps=-3", "log.every=5", "data.rot=x", "oops")
    assert sorted(lines) == sorted(
        [
            "base.yaml:2: optim.lr: 'fast': expected a number > 0",
            "base.yaml:3: optim.epz: unknown key (did you mean 'eps'?)",
            "a.yaml:4: model.width: -64: expected an integer > 0",
            "a.yaml:12: seed: 'x': expected an integer >= 0 and < 9223372036854775808",
            "a.yaml:13: seed: duplicate key, first set at a.yaml:12",
            "-o train.steps=-3: train.steps: -3: expected an integer > 0 or null",
            "-o data.rot=x: data.rot: unknown key (did you mean 'root'?)",
            "-o oops: expected KEY=VALUE, like train.steps=100",
        ]
    )


def test_all_contradictions_of_a_section_are_told_at_once(write):
    lines = complaints(write("a.yaml", SMALL), "model.width=66", "model.image_size=[40, 50]")
    assert [line.partition(": model.")[2] for line in lines] == [
        "heads: width 66 is not divisible by heads 4",
        "width: width 66 is not divisible by 4 (position table)",
        "image_size: image size 40 is not divisible by patch_size 16",
    ]


def test_knn_needs_held_out_images(write):
    path = write("a.yaml", SMALL)
    folder = ("evaluate.every=5", "data.name=image_folder", "data.root=x")
    assert "evaluate.every: k-NN needs data.eval_root" in complaints(path, *folder)[0]
    assert config.load(path, [*folder, "data.eval_root=y"]).evaluate.every == 5
    images = ("evaluate.every=5", "data.name=image_list", "data.list=x")
    assert "evaluate.every: a list has no held-out images" in complaints(path, *images)[0]


def test_a_wrong_name_does_not_blame_the_keys_that_it_implies():
    (line,) = complaints("moco_v3/vit_small", "model.name=vit_smal")
    assert line.endswith("(did you mean 'vit_small'?)")


def test_a_key_points_to_the_layer_that_set_it_last(write):
    write("base.yaml", SMALL + "log: {every: 1}\n")
    write("top.yaml", "_base_: base.yaml\nlog: {every: -1}\n")
    assert complaints("top.yaml")[0].startswith("top.yaml:2: log.every: -1")
    assert complaints("top.yaml", "log.every=-2")[0].startswith("-o log.every=-2: log.every: -2")
    assert complaints("base.yaml", "log.tensorboard=1")[0].startswith("-o log.tensorboard=1: ")


FLOATS = [
    f"{section}.{key}"
    for section, node in schemas.properties(schemas.schema()).items()
    for key, inner in schemas.properties(schemas.resolve(node)).items()
    if schemas.describe(inner).startswith("a number")
]


@pytest.mark.parametrize("key", FLOATS)
@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf", "-1"])
def test_no_number_may_be_nan_infinite_or_negative(write, key, value):
    (line,) = complaints(write("a.yaml", SMALL), f"{key}={value}")
    assert line.startswith(f"-o {key}={value}: {key}: {value}: expected a ")


def test_the_floats_were_found():
    assert {"optim.lr", "optim.clip_norm", "method.temperature"} <= set(FLOATS)
    assert len(FLOATS) >= 12


# -------------------------------------------------------------------------------- bad files


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "a.yaml: empty"),
        ("# only a comment\n", "a.yaml: empty"),
        ("- 1\n- 2\n", "a.yaml:1: expected a mapping (key: value), got [1, 2]"),
        ("hello\n", "a.yaml:1: expected a mapping (key: value), got 'hello'"),
        ("!!python/object/apply:os.system [touch hacked]", "tag !!python/object/apply:os.system"),
        (b"\x89PNG\r\n\x1a\n\x00", "a.yaml: not a text file in UTF-8 (byte 0x89 at 0)"),
        (b"\xff\xfes\x00", "a.yaml: not a text file in UTF-8 (byte 0xff at 0)"),
        (b"PK\x03\x04", "a.yaml:1: not YAML: character 0x0003"),
        (b"a" * 1_000_001, "a.yaml: longer than 1000000 bytes"),
        ("a: " + "[" * 100_000, "a.yaml:1: not YAML: nested deeper than 40 levels"),
        ("{" * 100_000, "a.yaml:1: not YAML: nested deeper than 40 levels"),
        ('a: "\\UFFFFFFFF"', "a.yaml: not YAML: an escape names no character"),
        ("_base_: a.yaml\n", "a.yaml:1: _base_: inheritance cycle: a.yaml -> a.yaml"),
        ("_base_: nope.yaml\n", "a.yaml:1: _base_: nope.yaml: no such file"),
        ("_base_: ''\n", "is a folder"),
        ("\n_base_: 3\n", "a.yaml:2: _base_: 3: expected a file, or a list of files"),
        ("_base_:\n", "a.yaml:1: _base_: null: expected a file, or a list of files"),
        ("_base_: {a: b}\n", "a.yaml:1: _base_: a mapping: expected a file, or a list of files"),
        ("_base_: !!binary aGk=\n", "a.yaml:1: _base_: tag !!binary is refused"),
    ],
)
def test_bad_files(write, content, message):
    lines = complaints(write("a.yaml", content))
    assert any(message in line for line in lines), lines
    assert not Path("hacked").exists()


def test_every_missing_base_is_told(write):
    write("there.yaml", SMALL)
    path = write("a.yaml", "_base_:\n- ther.yaml\n- there.yaml\n- moco_v3/digit\n- x.yaml\n")
    lines = complaints(path)
    assert [line.split(":")[1] for line in lines] == ["2", "4", "5"]
    assert "(did you mean 'there.yaml'?)" in lines[0]
    assert "(did you mean 'moco_v3/digits'?)" in lines[1]


def test_a_longer_cycle_is_shown(write):
    write("a.yaml", "_base_: in/b.yaml\n")
    write("in/b.yaml", "seed: 1\n_base_: [c.yaml]\n")
    write("in/c.yaml", "_base_: ./b.yaml\n")
    (line,) = complaints("a.yaml")
    assert line == "in/c.yaml:1: _base_: inheritance cycle: in/b.yaml -> in/c.yaml -> in/b.yaml"


def test_a_cycle_through_a_link_is_seen(write, tmp_path):
    write("a.yaml", "_base_: link.yaml\n")
    (tmp_path / "link.yaml").symlink_to(tmp_path / "a.yaml")
    assert "inheritance cycle" in complaints("a.yaml")[0]


def test_an_endless_chain_ends(write):
    for i in range(100):
        write(f"f{i}.yaml", f"_base_: f{i + 1}.yaml\n")
    assert "more than 20 files in a row" in complaints("f0.yaml")[0]


def test_a_mistake_in_a_base_names_the_base(write):
    write("base.yaml", "optim: [1,\n")
    assert complaints(write("a.yaml", f"_base_: base.yaml\n{SMALL}"))[0].startswith("base.yaml:2: ")


def test_links_cannot_explode(write):
    lines = ["l0: &l0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 10)}]" for i in range(1, 30)]
    (line,) = complaints(write("a.yaml", "\n".join(lines)))
    assert "links (*name) make it endless" in line


def test_links_within_a_file_may_be_used(write):
    views = "  view1: &v [{op: grayscale}]\n  view2: *v\n"
    spec = config.load(write("a.yaml", SMALL + views))
    assert spec.augment.view1 == spec.augment.view2 != ()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nope.yaml", "nope.yaml: no such file, and no recipe has this name"),
        ("smal.yaml", "(did you mean 'small.yaml'?)"),
        ("moco_v3/vit_smal", "(did you mean 'moco_v3/vit_small'?)"),
        (".", ".: is a folder; give a YAML file"),
        ("moco_v4", "no such file"),
        ("x" * 5000, "no such file"),
        ("a\0b", "no such file"),
        ("/dev/null", "/dev/null: empty"),
        ("/dev/zero", "/dev/zero: longer than 1000000 bytes"),
    ],
)
def test_paths_that_are_no_spec(write, name, message):
    write("small.yaml", SMALL)
    (line,) = complaints(name)
    assert message in line


def test_an_unreadable_file(write, tmp_path):
    path = tmp_path / write("a.yaml", SMALL)
    loop = tmp_path / "loop.yaml"
    loop.symlink_to(loop)
    assert "no such file" in complaints(loop)[0]
    assert "no such file" in complaints(path / "inside.yaml")[0]


def test_a_folder_does_not_hide_a_recipe(write, tmp_path):
    (tmp_path / "moco_v3" / "digits").mkdir(parents=True)
    assert config.load("moco_v3/digits").data.name == "digits"
    write("moco_v3/vit_small", SMALL)
    assert config.load("moco_v3/vit_small").model.width == 64  # a file comes first


@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
@example(b"? ")
@example(b"- - - -")
@example(b"%YAML 9.9\n---\na: 1")
@example(b"<<: {a: 1}")
@example(b"a: !<tag:yaml.org,2002:python/object/new:os.system> [x]")
@settings(
    deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200
)
def test_any_bytes_are_an_error_and_never_a_crash(write, content):
    assert complaints(write("a.yaml", content))


@pytest.mark.parametrize("key", [f"{k}" for k in schemas.properties(schemas.schema())] + FLOATS)
@pytest.mark.parametrize(
    "value", ["[[]]", "{a: {b: c}}", "'\\ud800'", "1e400", "-0x1", '"\\ud800"']
)
def test_any_kind_of_value_anywhere_is_an_error_or_a_spec(write, key, value):
    try:
        config.load(write("a.yaml", SMALL), [f"{key}={value}"])
    except UserError as error:
        str(error).encode()


# ---------------------------------------------------------------------------------- the schema


def test_the_schema_file_is_up_to_date():
    assert json.loads((config.CONFIGS / "schema.json").read_text()) == schemas.schema(), (
        "run: python -m triptych.core.config > configs/schema.json"
    )


def test_the_module_prints_the_schema_file():
    done = subprocess.run(
        [sys.executable, "-m", "triptych.core.config"], capture_output=True, text=True, check=True
    )
    assert done.stdout == (config.CONFIGS / "schema.json").read_text()


def test_the_schema_lets_a_file_say_half_and_inherit():
    text = (config.CONFIGS / "schema.json").read_text()
    assert '"required"' not in text and '"oneOf"' not in text
    top = schemas.schema()["properties"]
    assert set(top) == {"_base_", *RunSpec.model_fields}
    assert all(node["additionalProperties"] is False for node in schemas.schema()["$defs"].values())


def test_every_section_and_operation_is_described():
    for name, node in schemas.schema()["$defs"].items():
        assert node.get("description"), name
    assert (
        "EMA momentum"
        in schemas.schema()["$defs"]["MocoV3Spec"]["properties"]["momentum"]["description"]
    )


@pytest.mark.parametrize(
    "path", [*config.CONFIGS.rglob("*.yaml"), *(GOLDEN / "specs").glob("*.yaml")], ids=str
)
def test_every_file_names_the_schema(path):
    head, _, where = path.read_text().splitlines()[0].partition("$schema=")
    assert head == "# yaml-language-server: "
    assert (path.parent / where).resolve() == config.CONFIGS / "schema.json"


@pytest.mark.parametrize("name", [n for n in config.recipes() if not n.endswith("digits")])
def test_recipes_tell_where_they_are_from(name):
    text = config.recipes()[name].read_text()
    for word in ("arXiv", "Row:", "Reported:", "Not run here"):
        assert word in text


def test_vit_recipes_hold_the_published_values():
    small, base, large = (config.load(f"moco_v3/vit_{s}") for s in ("small", "base", "large"))
    assert [(s.model.width, s.model.depth, s.model.heads) for s in (small, base, large)] == [
        (384, 12, 12),
        (768, 12, 12),
        (1024, 24, 16),
    ]
    assert [s.optim.clip_norm for s in (small, base, large)] == [None, None, 5.0]
    for spec in (small, base, large):
        assert (spec.train.epochs, spec.train.batch_size) == (300, 4096)
        assert math.isclose(spec.optim.lr * 4096 / 256, 2.4e-3)
        assert [op.op for op in spec.augment.view1] == [
            "random_resized_crop",
            "color_jitter",
            "grayscale",
            "gaussian_blur",
            "horizontal_flip",
        ]
        assert [op.p for op in spec.augment.view1] == [1, 0.8, 0.2, 1.0, 0.5]
        assert [op.op for op in spec.augment.view2] == [
            "random_resized_crop",
            "color_jitter",
            "grayscale",
            "gaussian_blur",
            "solarize",
            "horizontal_flip",
        ]
        assert [op.p for op in spec.augment.view2] == [1, 0.8, 0.2, 0.1, 0.2, 0.5]
        assert spec.augment.view1[0].scale == spec.augment.view2[0].scale == (0.08, 1.0)
