"""Files that are no spec: missing, malformed, hostile, inheriting in circles."""

from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.spec_files import SMALL, complaints, write

from triptych.core import config


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Each test runs in a folder of its own."""
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "a.yaml: empty"),
        ("# only a comment\n", "a.yaml: empty"),
        ("- 1\n- 2\n", "a.yaml:1: expected a mapping (key: value), got [1, 2]"),
        ("hello\n", "a.yaml:1: expected a mapping (key: value), got 'hello'"),
        ("!!python/object/apply:os.system [touch hacked]", "tag !!python/object/apply:os.system"),
        (
            b"\x89PNG\r\n\x1a\n\x00",
            "a.yaml: not a text file in UTF-8 (byte 0x89 at 0); give a YAML",
        ),
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
def test_bad_files(content, message):
    lines = complaints(write("a.yaml", content))
    assert any(message in line for line in lines), lines
    assert not Path("hacked").exists()


def test_every_missing_base_is_told():
    write("there.yaml", SMALL)
    path = write("a.yaml", "_base_:\n- ther.yaml\n- there.yaml\n- moco_v3/digit\n- x.yaml\n")
    lines = complaints(path)
    assert [line.split(":")[1] for line in lines] == ["2", "4", "5"]
    assert "(did you mean 'there.yaml'?)" in lines[0]
    assert "(did you mean 'moco_v3/digits'?)" in lines[1]


def test_a_longer_cycle_is_shown():
    write("a.yaml", "_base_: in/b.yaml\n")
    write("in/b.yaml", "seed: 1\n_base_: [c.yaml]\n")
    write("in/c.yaml", "_base_: ./b.yaml\n")
    (line,) = complaints("a.yaml")
    assert line == "in/c.yaml:1: _base_: inheritance cycle: in/b.yaml -> in/c.yaml -> in/b.yaml"


def test_a_cycle_through_a_link_is_seen(tmp_path):
    write("a.yaml", "_base_: link.yaml\n")
    (tmp_path / "link.yaml").symlink_to(tmp_path / "a.yaml")
    assert "inheritance cycle" in complaints("a.yaml")[0]


def test_an_endless_chain_ends():
    for i in range(100):
        write(f"f{i}.yaml", f"_base_: f{i + 1}.yaml\n")
    assert "more than 20 files in a row" in complaints("f0.yaml")[0]


def test_a_mistake_in_a_base_names_the_base():
    write("base.yaml", "optim: [1,\n")
    assert complaints(write("a.yaml", f"_base_: base.yaml\n{SMALL}"))[0].startswith("base.yaml:2: ")


def test_links_cannot_explode():
    lines = ["l0: &l0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 10)}]" for i in range(1, 30)]
    (line,) = complaints(write("a.yaml", "\n".join(lines)))
    assert "links (*name) make it endless" in line


def test_links_within_a_file_may_be_used():
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
def test_paths_that_are_no_spec(name, message):
    write("small.yaml", SMALL)
    (line,) = complaints(name)
    assert message in line


def test_an_unreadable_file(tmp_path):
    path = tmp_path / write("a.yaml", SMALL)
    loop = tmp_path / "loop.yaml"
    loop.symlink_to(loop)
    assert "no such file" in complaints(loop)[0]
    assert "no such file" in complaints(path / "inside.yaml")[0]


def test_a_folder_does_not_hide_a_recipe(tmp_path):
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
@settings(deadline=None, max_examples=200)
def test_any_bytes_are_an_error_and_never_a_crash(content):
    assert complaints(write("a.yaml", content))
