"""Specs as they should be: inheritance, overrides, round trips, recipes, the schema."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.spec_files import SMALL, complaints, write

from triptych.core import config
from triptych.core.config import schema as schemas
from triptych.core.config.spec import RunSpec

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Each test runs in a folder of its own."""
    monkeypatch.chdir(tmp_path)


# ------------------------------------------------------------------------------- what is right


def test_a_small_spec():
    spec = config.load(write("a.yaml", SMALL))
    assert (spec.model.width, spec.method.name, spec.train.steps) == (64, "moco_v3", 3)
    assert spec.optim.betas == (0.9, 0.999)


@pytest.mark.parametrize("name", config.recipes())
def test_recipes_load_and_return_from_their_dump(name):
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
    assert not any(name.startswith("_base_/") for name in config.recipes())


@pytest.mark.parametrize(
    "root", ["yes", "1e3", "0o17", "null", "2020-01-01", "1_0", "", "~", "é\n"]
)
def test_dump_keeps_text_text(root):
    given = {**config.load(write("a.yaml", SMALL)).model_dump()}
    given["data"] = {**given["data"], "root": root}
    spec = RunSpec.model_validate(given)
    assert config.load(write("dump.yaml", config.dump(spec))) == spec


@given(st.floats(1e-300, 1e300), st.integers(0, 2**63 - 1))
@settings(deadline=None, max_examples=50)
def test_dump_keeps_every_bit_of_a_number(lr, seed):
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


def test_mappings_merge_and_lists_replace():
    write("one.yaml", SMALL + "optim: {lr: 1e-3, eps: 1e-6, betas: [0.8, 0.9]}\nseed: 1\n")
    write("two.yaml", "optim: {lr: 2e-3}\nevaluate: {per_class: [1, 2, 3]}\n")
    spec = config.load(
        write("a.yaml", "_base_: [one.yaml, two.yaml]\nevaluate: {per_class: [5]}\nseed: 2\n")
    )
    # two.yaml wins over one.yaml, the file itself over both.
    assert (spec.optim.lr, spec.optim.eps, spec.optim.betas) == (2e-3, 1e-6, (0.8, 0.9))
    assert (spec.evaluate.per_class, spec.seed) == ((5,), 2)


def test_bases_are_relative_to_the_file_that_names_them():
    write("deep/shared/small.yaml", SMALL)
    write("deep/middle.yaml", "_base_: shared/small.yaml\nseed: 5\n")
    spec = config.load(write("a.yaml", "_base_: deep/middle.yaml\n"))
    assert (spec.seed, spec.model.depth) == (5, 2)


def test_a_recipe_is_a_base_wherever_one_is():
    spec = config.load(write("a.yaml", "_base_: moco_v3/digits\ntrain: {batch_size: 32}\n"))
    assert spec == config.load("moco_v3/digits", ["train.batch_size=32"])


def test_two_bases_may_share_a_base():
    write("small.yaml", SMALL)
    write("one.yaml", "_base_: small.yaml\nseed: 1\n")
    write("two.yaml", "_base_: small.yaml\nlog: {every: 7}\n")
    spec = config.load(write("a.yaml", "_base_: [one.yaml, two.yaml]\n"))
    assert (spec.seed, spec.log.every) == (1, 7)


def test_many_shared_bases_take_no_time():
    write("f0.yaml", SMALL)
    for i in range(1, 18):
        write(f"f{i}.yaml", f"_base_: [{', '.join([f'f{i - 1}.yaml'] * 9)}]\nseed: {i}\n")
    assert config.load("f17.yaml").seed == 17


@pytest.mark.parametrize("text", ["2024", "1e3", "true", "[2019]", "{a}", "[a, b #1]", "007"])
def test_a_key_that_takes_text_gets_it_as_typed(text):
    path = write("a.yaml", SMALL)
    assert config.load(path, [f"data.root={text}"]).data.root == text
    assert config.load(path, ["data.name=digits", "data.root=null"]).data.root is None


def test_overrides_are_the_last_layer():
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
    "text",
    [
        "My Photos #2",
        "#2",
        "a: b",
        "Photos: 2024 # new",
        "- photos",
        "*new*",
        "&c",
        "!important",
        "%TEMP%",
        "@eaDir",
        "`pwd`",
        "|",
        "> x",
        "? x",
        "a=b=c",
        " in spaces  ",
        "C:\\Users\\me\\new",
        "2024 and on",
        "[old] photos",
        '"open',
        "'90s",
        "it's #1",
        "中文 # ü",
        "\udcff\udc80 not UTF-8",
    ],
)
def test_a_key_that_takes_text_gets_what_stands_after_the_equals_sign(text):
    spec = config.load(write("a.yaml", SMALL), [f"data.root={text}"])
    assert spec.data.root == text
    assert config.load(write("dump.yaml", config.dump(spec))) == spec


def test_quotes_lists_and_mappings_are_yaml_without_comments():
    path = write("a.yaml", SMALL)

    def root(text):
        return config.load(path, [f"data.root={text}"]).data.root

    assert root("'My Photos #2'") == root('"My Photos #2"') == "My Photos #2"
    assert (
        root("'2024'") == "2024"
        and root("'[old]'") == "[old]"
        and root("null") is None
        and root("") is None
    )
    assert root('"a\\tb"') == "a\tb"
    spec = config.load(path, ["data={root: a #1, list: 'b # 2'}", "model.image_size= [32, 48] "])
    assert (spec.data.root, spec.data.list, spec.model.size) == ("a #1", "b # 2", (32, 48))


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
def test_numbers_are_those_of_yaml_1_2(text, value):
    path = write("a.yaml", SMALL.replace("[0.5, 0.5, 0.5]", f"[{text}]"))
    if value is None:
        assert complaints(path)[0].startswith("a.yaml:10: augment.mean.0: ")
    else:
        assert config.load(path).augment.mean == (value,)


@pytest.mark.parametrize("text", ["no", "off", "y", "NO", "1", "null", "'true'"])
def test_only_true_and_false_are_true_and_false(text):
    path = write("a.yaml", SMALL)
    assert "expected true or false" in complaints(path, f"log.tensorboard={text}")[0]
    assert config.load(path, ["log.tensorboard=False"]).log.tensorboard is False


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


PUBLISHED = [n for n in config.recipes() if "digits" not in n and "fashion_mnist" not in n]


@pytest.mark.parametrize("name", PUBLISHED)
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
