"""Mistakes in a spec: each has its line, with place, key, value and what is allowed."""

import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.spec_files import SMALL, complaints, write

from triptych.core import config
from triptych.core.config import schema as schemas
from triptych.core.config.spec import FinetuneSpec, MocaSpec
from triptych.core.errors import UserError


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Each test runs in a folder of its own."""
    monkeypatch.chdir(tmp_path)


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
    ("train.steps=1.5", "train.steps: 1.5: expected an integer > 0 and <= 1000000000 or null"),
    ("train.steps=10000000000000000000", "expected an integer > 0 and <= 1000000000 or null"),
    ("train.batch_size=-8", "train.batch_size: -8: expected an integer > 0"),
    ("seed=-1", "seed: -1: expected an integer >= 0 and < 9223372036854775808"),
    ("train.accumulate=3", "train.accumulate: train.batch_size"),
    ("train.accumulate=0", "train.accumulate: 0: expected an integer > 0"),
    ("parallel.data=true", "parallel.data: true: expected an integer > 0"),
    ("parallel.data=3", "is not divisible by data 3 x accumulate 1 x micro_batches 1 = 3"),
    ("parallel.tensor=3", "parallel.tensor: model.heads"),
    ("parallel.pipeline=64", "parallel.pipeline: 64 stages, but model.depth"),
    ("parallel.micro_batches=2", "parallel.micro_batches: 2: a pipeline of one stage has none"),
    ("parallel.shard_optimizer=true", "one copy of the model has nothing to share"),
    ("data.channels=true", "data.channels: true: expected an integer >= 1 and <= 4"),
    ("threads=0", "threads: 0: expected an integer > 0 and <= 1024 or auto"),
    (
        "model.image_size=[32]",
        "model.image_size: [32]: expected an integer > 0 and <= 8192 or a list",
    ),
    ("model.image_size=[3, a]", "model.image_size: [3, 'a']: expected an integer > 0 and <= 8192"),
    ("optim.betas=[0.9]", "optim.betas: [0.9]: expected a list of 2, each a number >= 0 and < 1"),
    ("optim.betas=[.nan, 0.9]", "optim.betas.0: .nan: expected a finite number >= 0 and < 1"),
    ("optim.betas=[0.9, 1.0]", "optim.betas.1: 1.0: expected a number >= 0 and < 1"),
    ("augment.mean=3", "augment.mean: 3: expected a list, each a number"),
    ("log=3", "log: 3: expected a mapping"),
    ("threads=100000", "threads: 100000: expected"),
    ("model.image_size=100000", "model.image_size: 100000: expected"),
    ("model.depth=100000", "model.depth: 100000: expected"),
    ("log=", "log: null: expected a mapping"),
    ("device=gpu", "device: 'gpu': expected auto, cpu, cuda or cuda:N"),
    ("device=cuda:x", "device: 'cuda:x': expected auto, cpu, cuda or cuda:N"),
    # A choice: its values are listed, and the nearest is named.
    (
        "data.name=digit",
        "data.name: 'digit': expected one of digits, image_folder, image_list, cifar10, "
        "cifar100, idx, stl10, flowers102, pets, webdataset, parquet (did you mean 'digits'?)",
    ),
    ("backend=pytorch", "backend: 'pytorch': expected one of torch, oneflow, paddle or null (did"),
    (
        "precision=half",
        "precision: 'half': expected one of float32, float64, tf32, bfloat16, float16",
    ),
    (
        "method.name=dino",
        "method.name: 'dino': expected one of finetune, linear, moca, moco_v1",
    ),
    ("evaluate.protocols=[knnn]", "evaluate.protocols.0: 'knnn': expected one of knn, probe, rank"),
    ("model.name=resnet5", "model.name: 'resnet5': expected one of resnet, resnet101, resnet152"),
    ("model.name=[a]", "model.name: ['a']: expected one of resnet, resnet101"),
    # An unknown key, with the nearest one, or the one of this name in another section.
    ("optim.lrr=1", "optim.lrr: unknown key (did you mean 'lr'?)"),
    ("optm.lr=1", "optm: unknown key (did you mean 'optim'?)"),
    ("lr=1", "lr: unknown key (did you mean 'optim.lr'?)"),
    ("batch_size=8", "batch_size: unknown key (did you mean 'train.batch_size'?)"),
    ("log.zzz=1", "log.zzz: unknown key; expected one of every, tensorboard"),
    ("_base_=x.yaml", "_base_: unknown key"),
    # A key that belongs to another member of the section.
    ("optim.momentum=0.9", "optim.momentum: unknown key: only where optim.name is lars, sgd"),
    ("method.queue_size=8", "method.queue_size: unknown key: only where method.name is moco_v1"),
    ("model.zero_init_residual=true", "only where model.name is resnet, resnet101, resnet152"),
    (
        "model.mlp_ratio=2.7",
        "model.mlp_ratio: 2.7 times width 64 is 172.8: expected a whole number of hidden units",
    ),
    ("model.mlp_ratio=1e-9", "model.mlp_ratio: 1e-09 times width 64 is 6.4e-08: expected a whole"),
    ("model.mlp_ratio=2000", "model.mlp_ratio: 2000: expected a number > 0 and <= 1024"),
    (
        "augment.view1=[{op: grayscale, sigma: [1, 2]}]",
        "augment.view1.0.sigma: unknown key: only where augment.view1.0.op is gaussian_blur",
    ),
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
        "augment.view1=[{op: random_erase}, {op: horizontal_flip}]",
        "augment.view1.0.op: random_erase acts on the finished view; put it last",
    ),
    (
        "augment.repeats=1000000",
        "augment.repeats: 1000000 copies of an image are more than train.batch_size",
    ),
    (
        "augment.view1=[{op: rand_augment, fill: [1, 2]}]",
        "augment.view1.0.fill: 2 values for 3 channels: give one, or one each",
    ),
    (
        "optim.warmup_steps=4",
        "optim.warmup_steps: a warm-up of 4 steps is longer than the run of 3",
    ),
    (
        "optim.schedule=multistep",
        "optim.milestones: schedule multistep needs at least one",
    ),
    ("optim.milestones=[1]", "optim.milestones: schedule cosine has none; use multistep"),
    (
        "optim={schedule: multistep, milestones: [2, 1]}",
        "optim.milestones: expected ascending numbers",
    ),
    (
        "optim={schedule: multistep, milestones: [1, 3]}",
        "optim.milestones: 3 is not before the end of the run of 3 steps",
    ),
    (
        "batch_norm.virtual_ranks=7",
        "batch_norm.virtual_ranks: train.batch_size 256 is not divisible by 7",
    ),
    (
        "batch_norm.virtual_ranks=256",
        "batch_norm.virtual_ranks: 256 parts of a batch of 256 hold one image each",
    ),
    (
        "method={name: moco_v2, queue_size: 128}",
        "method.queue_size: 128: smaller than train.batch_size 256",
    ),
    ("model={stem: conv, width: 36}", "model.width: width 36 is not divisible by 8 (stem conv)"),
    ("model={stem: conv, patch_size: 8}", "model.patch_size: stem conv halves an image four times"),
    ("data.name=image_folder", "data.root: data.name image_folder needs data.root"),
    ("data.name=image_list", "data.list: data.name image_list needs data.list"),
    # What is no override.
    ("train", "expected KEY=VALUE"),
    ("=3", "expected KEY=VALUE"),
    ("a..b=3", "expected KEY=VALUE"),
    ("optim.betas=[", "not YAML"),
    ("optim.betas=[0.9, 0.95] # as ever", "not YAML"),
    ("model={width: 32 # less", "not YAML"),
    ("seed=a: b: c", "seed: 'a: b: c': expected an integer"),
    ("seed=1\n---\n2", "seed: '1\\n---\\n2': expected an integer"),
    ("seed=1 # the first", "seed: '1 # the first': expected an integer"),
    ("seed=!!python/name:os.system x", "seed: '!!python/name:os.system x': expected an integer"),
    ("augment.view1=[!!python/name:os.system x]", "tag !!python/name:os.system is refused"),
]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("{name: resnet, depths: [1, 1, 1, 1]}", "model.block: missing: expected one of basic"),
        ("{name: resnet, block: basic}", "model.depths: missing: expected a list of 4, each an"),
        ("{name: resnet18, depths: [2, 2]}", "model.depths: [2, 2]: expected a list of 4, each"),
    ],
)
def test_a_residual_network_without_a_size_needs_block_and_depths(change, message):
    with pytest.raises(UserError) as error:
        config.load("moco_v2/resnet50", [f"model={change}"])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("override", "message"), WRONG)
def test_a_wrong_override_has_its_line(override, message):
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
        (
            ("method: {", "data: {root: 2024}\nmethod: {"),
            6,
            "data.root: 2024: expected text or null; text that looks like this needs quotes",
        ),
        (("  steps: 3", "  steps: three"), 8, "train.steps: 'three': expected an integer > 0"),
        (("method: {name: moco_v3}\n", ""), 1, "method: missing: expected a mapping"),
        (
            ("{name: moco_v3}", "{}"),
            6,
            "method.name: missing: expected one of finetune, linear, moca, moco_v1",
        ),
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
def test_a_wrong_file_has_its_line(change, line, message):
    lines = complaints(write("a.yaml", SMALL.replace(*change)))
    assert any(text.startswith(f"a.yaml:{line}: ") and message in text for text in lines), lines


def test_all_mistakes_are_told_at_once():
    write("base.yaml", "optim:\n  lr: fast\n  epz: 1\nlog: {every: 0}\n")
    path = write(
        "a.yaml", "_base_: base.yaml\n" + SMALL.replace("64", "-64") + "seed: x\nseed: 1\n"
    )
    lines = complaints(path, "train.steps=-3", "log.every=5", "data.rot=x", "oops")
    assert sorted(lines) == sorted(
        [
            "base.yaml:2: optim.lr: 'fast': expected a number > 0",
            "base.yaml:3: optim.epz: unknown key (did you mean 'eps'?)",
            "a.yaml:4: model.width: -64: expected an integer > 0 and <= 65536",
            "a.yaml:12: seed: 'x': expected an integer >= 0 and < 9223372036854775808",
            "a.yaml:13: seed: duplicate key, first set at a.yaml:12",
            "-o train.steps=-3: train.steps: -3: expected an integer > 0 and <= 1000000000 or null",
            "-o data.rot=x: data.rot: unknown key (did you mean 'root'?)",
            "-o oops: expected KEY=VALUE, like train.steps=100",
        ]
    )


def test_all_contradictions_of_a_section_are_told_at_once():
    lines = complaints(write("a.yaml", SMALL), "model.width=66", "model.image_size=[40, 50]")
    assert [line.partition(": model.")[2] for line in lines] == [
        "heads: width 66 is not divisible by heads 4",
        "width: width 66 is not divisible by 4 (position table)",
        "image_size: image size 40 is not divisible by patch_size 16",
    ]


def test_knn_needs_held_out_images():
    path = write("a.yaml", SMALL)
    folder = ("evaluate.every=5", "data.name=image_folder", "data.root=x")
    assert "evaluate.every: an evaluation needs data.eval_root" in complaints(path, *folder)[0]
    assert config.load(path, [*folder, "data.eval_root=y"]).evaluate.every == 5
    images = ("evaluate.every=5", "data.name=image_list", "data.list=x")
    assert "evaluate.every: an evaluation needs data.eval_list" in complaints(path, *images)[0]
    assert config.load(path, [*images, "data.eval_list=y"]).evaluate.every == 5
    assert (
        "data.eval_list: only image_list has lists"
        in complaints(path, *folder, "data.eval_root=y", "data.eval_list=z")[0]
    )


def test_a_wrong_name_does_not_blame_the_keys_that_it_implies():
    (line,) = complaints("moco_v3/vit_small", "model.name=vit_smal")
    assert line.endswith("(did you mean 'vit_small'?)")


def test_a_key_points_to_the_layer_that_set_it_last():
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


OF_LARS = {"optim.momentum", "optim.trust_coefficient"}
OF_MOCA = {f"method.{name}" for name in MocaSpec.model_fields} - {"method.momentum"}
OF_FINETUNING = {f"method.{name}" for name in FinetuneSpec.model_fields} - {"method.momentum"}
FINETUNING = SMALL.replace("{name: moco_v3}", "{name: finetune, classes: 10}")


@pytest.mark.parametrize("key", FLOATS)
@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf", "-1"])
def test_no_number_may_be_nan_infinite_or_negative(key, value):
    # LARS has every number that SGD has, and one more.
    other = "optim: {name: lars}\n" if key in OF_LARS else ""
    other += "_base_: moca/digits\n" if key in OF_MOCA else ""
    small = FINETUNING if key in OF_FINETUNING else SMALL
    path = write("a.yaml", other if key in OF_MOCA else small + other)
    (line,) = complaints(path, f"{key}={value}")
    assert line.startswith(f"-o {key}={value}: {key}: {value}: expected a ")


def test_the_floats_were_found():
    assert {"optim.lr", "optim.clip_norm", "method.temperature"} <= set(FLOATS)
    assert len(FLOATS) >= 12


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats() | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=5,
    ),
    st.sampled_from(["seed", "optim.lr", "data.root", "model", "augment.view1", "x.y", "train"]),
)
@settings(deadline=None, max_examples=150)
def test_any_override_is_a_value_or_an_error(value, key):
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
@settings(deadline=None)
def test_any_text_after_o_is_an_error_or_a_spec(text):
    path = write("a.yaml", SMALL)
    try:
        config.load(path, [text])
    except UserError as error:
        assert str(error).startswith("-o ")


@pytest.mark.parametrize("key", [*schemas.properties(schemas.schema()), *FLOATS])
@pytest.mark.parametrize(
    "value", ["[[]]", "{a: {b: c}}", "'\\ud800'", "1e400", "-0x1", '"\\ud800"']
)
def test_any_kind_of_value_anywhere_is_an_error_or_a_spec(key, value):
    try:
        config.load(write("a.yaml", SMALL), [f"{key}={value}"])
    except UserError as error:
        str(error).encode()


def test_a_protocol_is_named_once(tmp_path):
    with pytest.raises(UserError) as caught:
        config.load("moco_v3/digits", ["evaluate.protocols=[knn,rank,knn]"])
    assert str(caught.value).endswith("evaluate.protocols: knn is there twice; name it once")


def test_a_named_resnet_has_its_own_blocks():
    with pytest.raises(UserError, match=r"model\.name: resnet18 has other blocks than bottleneck"):
        config.load("moco_v2/digits", ["model.block=bottleneck"])
    anyone = config.load("moco_v2/digits", ["model.name=resnet", "model.block=bottleneck",
                                            "model.depths=[1,1,1,1]"])  # fmt: skip
    assert anyone.model.expansion == 4
