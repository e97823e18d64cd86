"""Files that other systems wrote: recognised, equal after the way back, equal in their features."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import TOLERANCE, relative_error
from support import foreign
from support.resuming import written

from triptych.core import formats, launch, reference
from triptych.core.files import reading
from triptych.core.formats.detection import Source, recognise
from triptych.core.formats.moments import KINDS

NAMES = foreign.NAMES
WRONG = 1e-3
"""Relative error of the features below which a fault of the tables would stay unseen."""


def faults(source: Source, file: str) -> list[str]:
    """The tensors that differ from the file's after the way to canonical names and back."""
    expected = foreign.description(file)["tensors"]
    back, left = source.layout.table.from_canonical(source.tensors, source.facts)
    both = {**back, **source.renamed.unknown}
    found = {name: foreign.digest(tensor) for name, tensor in both.items()}
    wrong = [name for name in {**expected, **found} if found.get(name) != expected.get(name)]
    return [*wrong, *left]


def errors(source: Source, file: str, backend: str = "reference") -> dict[str, float]:
    """The relative error of each of the file's features."""
    spec = foreign.spec_of_source(file, source)
    state = foreign.state_of(source, spec)
    build = reference.build if backend == "reference" else None
    engine = build(spec, state) if build else launch.open_engine(spec, backend, state)
    size = foreign.description(file)["image_size"]
    found, golden = foreign.features(engine, spec, state, size), foreign.golden(file)
    return {name: relative_error(found[name], golden[name]) for name in golden if name in found}


@pytest.mark.parametrize("file", NAMES)
def test_the_format_is_recognised_and_every_tensor_comes_back(file: str, tmp_path: Path) -> None:
    source, about = foreign.source_of(file, tmp_path), foreign.description(file)
    assert source.format.name == about["format"].split()[0]
    assert faults(source, file) == []


@pytest.mark.parametrize("file", NAMES)
def test_the_architecture_is_read_from_the_file(file: str, tmp_path: Path) -> None:
    about = foreign.description(file)
    spec = foreign.spec_of_source(file, foreign.source_of(file, tmp_path))
    found = foreign.architecture_of(spec)
    expected = {key: value for key, value in about["architecture"].items() if key != "qkv"}
    assert {key: found[key] for key in expected} == expected


@pytest.mark.parametrize("file", NAMES)
def test_the_features_are_those_of_the_system(file: str, tmp_path: Path) -> None:
    found = errors(foreign.source_of(file, tmp_path), file)
    assert max(found.values()) < TOLERANCE["float64"]["features"], found
    assert {"student/feature"} < found.keys()


@pytest.mark.parametrize("file", foreign.PADDLE)
def test_the_features_are_those_of_the_system_on_each_backend(
    backend: object, backend_name: str, file: str, tmp_path: Path
) -> None:
    found = errors(foreign.source_of(file, tmp_path), file, backend_name)
    assert max(found.values()) < TOLERANCE["float64"]["features"], found


def mutated(source: Source, mutation: str) -> Source:
    """The source as a faulty table would read it."""
    tensors, raw = dict(source.tensors), source.place.tensors
    if mutation == "branches":
        other = {"student": "teacher", "teacher": "student"}
        swapped = {f"{other[n.partition('.')[0]]}.{n.partition('.')[2]}": n for n in tensors
                   if n.startswith(("student.encoder", "teacher.encoder"))}  # fmt: skip
        tensors |= {name: source.tensors[twin] for name, twin in swapped.items()}
    elif mutation == "query and key":
        joined = [name for name in tensors if ".blocks.1.attn.qkv." in name]
        tensors |= {name: tensors[name].changed(tensors[name].shape, exchanged) for name in joined}
    else:
        tensors[mutation] = raw[source.named(mutation)]
    return replace(source, renamed=replace(source.renamed, tensors=tensors))


def exchanged(bits: np.ndarray) -> np.ndarray:
    """The rows of the key before those of the query."""
    query, key, value = np.split(bits, 3)
    return np.concatenate([key, query, value])


@pytest.mark.parametrize(
    ("file", "mutation"),
    [
        ("huggingface_vit_model_pooler_bin", "query and key"),
        ("mmpretrain_mocov3_resnet18_lars_epoch_1.pth", "branches"),
        ("plsc_moco_v3_vit.pd", "student.encoder.blocks.1.attn.proj.weight"),
        ("plsc_moco_v3_vit.pd", "teacher.projector.3.weight"),
        ("plsc_moco_v3_vit.pd", "branches"),
        ("paddlefleetx_moco_v2_bottleneck", "student.projector.0.weight"),
        ("libai_moco_v3_vit", "teacher.encoder.blocks.0.attn.qkv.weight"),
        ("libai_moco_v3_vit", "student.encoder.blocks.1.attn.qkv.bias"),
        ("libai_moco_v3_vit", "branches"),
    ],
)
def test_a_fault_of_a_table_is_seen(file: str, mutation: str, tmp_path: Path) -> None:
    """A square matrix left as it is, rows not permuted, student and teacher exchanged."""
    wrong = mutated(foreign.source_of(file, tmp_path), mutation)
    assert faults(wrong, file)
    assert max(errors(wrong, file).values()) > WRONG


@pytest.mark.parametrize(
    ("file", "norm"),
    [
        ("mmpretrain_lincls_vit_epoch_1.pth", "student.encoder.norm."),
        ("detectron2_moco_v2_resnet18_numpy2.pkl", "student.encoder.layer2.0.downsample.1."),
        ("huggingface_vit_model_pooler_bin", "student.encoder.blocks.2.norm2."),
    ],
)
def test_a_norm_that_a_table_does_not_rename_is_seen(file: str, norm: str, tmp_path: Path) -> None:
    source = foreign.source_of(file, tmp_path)
    tensors = {name: t for name, t in source.tensors.items() if not name.startswith(norm)}
    assert len(source.tensors) - len(tensors) in (2, 5)
    wrong = replace(source, renamed=replace(source.renamed, tensors=tensors))
    assert max(errors(wrong, file).values()) > WRONG


def moments(source: Source) -> dict[str, dict[str, str]]:
    """The hashes of the moments in the layout of the file, by kind and name in the file."""
    optimizer, known = source.optimizer, source.format.moments
    assert optimizer and known
    found = {}
    for theirs, ours in zip(known.optimizers[optimizer.name], KINDS[optimizer.name], strict=True):
        prefix = f"optimizer.{ours}."
        own = {n.removeprefix(prefix): t for n, t in optimizer.tensors.items() if prefix in n}
        back, _ = source.layout.table.from_canonical(own, source.facts)
        found[theirs] = {name: foreign.digest(tensor)[2] for name, tensor in back.items()}
    return found


@pytest.mark.parametrize("file", [*foreign.TRAINED, "mmpretrain_mocov3_resnet18_lars_epoch_1.pth"])
def test_each_moment_is_at_its_parameter_there_and_back(file: str, tmp_path: Path) -> None:
    source, told = foreign.source_of(file, tmp_path), foreign.description(file)["optimizer"]
    assert moments(source) == told["moments"]
    spec = foreign.spec_of_source(file, source)
    state = formats.load_training_state(source.content.path, spec, print)
    written(source.format, state, spec, tmp_path / "w")
    again = recognise(reading.read(tmp_path / "w"), facts=foreign.facts_of(file))
    assert moments(again) == told["moments"]
    step = state["optimizer.step"]
    assert (again.optimizer.tensors["optimizer.step"].array() if told["step"] else 0) == step
    assert step == (told["step"] or 0)
