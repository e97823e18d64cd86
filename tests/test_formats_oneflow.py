"""What is special about the folders of LiBai and OneFlow."""

from pathlib import Path

import numpy as np
import pytest
from support import foreign
from support.resuming import written

from triptych.core import formats
from triptych.core.errors import UserError
from triptych.core.files import reading
from triptych.core.files.saving import write
from triptych.core.files.tree import Stored
from triptych.core.formats import libai
from triptych.core.formats.detection import recognise
from triptych.core.formats.format import Output
from triptych.core.formats.moments import parameters

LIBAI, FLOWVISION = "libai_moco_v3_vit", "oneflow_resnet18_sgd"


def test_the_number_of_heads_is_asked_for(tmp_path: Path) -> None:
    content = foreign.content_of(LIBAI, tmp_path)
    with pytest.raises(UserError, match=r"model.heads: .* head by head.*-o model.heads=NUMBER"):
        recognise(content)
    with pytest.raises(UserError, match=r"\(72, 24\) are no multiple of 3 \* 5 heads"):
        recognise(content, facts={"model.heads": 5})


@pytest.mark.parametrize("part", ["", "model", "checkpoint"])
def test_a_folder_of_several_folders_has_one_state_dict(tmp_path: Path, part: str) -> None:
    path = foreign.content_of(FLOWVISION, tmp_path).path / part
    source = recognise(reading.read(path))
    assert source.format.name == "oneflow" and len(source.tensors) == 86
    if part == "":
        assert source.place.name == "checkpoint|model"


def test_the_own_loader_opens_what_is_written(
    backend: object, backend_name: str, tmp_path: Path
) -> None:
    source = foreign.source_of(LIBAI, tmp_path)
    spec = foreign.spec_of_source(LIBAI, source)
    back, _ = source.layout.table.from_canonical(source.tensors, source.facts)
    container, tree = source.format.output(Output(source.layout, back, {}, spec, step=2))
    write(tmp_path / "run", tree, container)
    assert (tmp_path / "run" / "last_checkpoint").read_text() == "model_0000001"
    again = recognise(reading.read(tmp_path / "run"), facts=foreign.facts_of(LIBAI))
    assert again.layout is source.layout
    for name, tensor in source.place.tensors.items():
        assert np.array_equal(again.place.tensors[name].bits(), tensor.bits())
    if backend_name == "oneflow":
        import oneflow

        folder = tmp_path / "run" / "model_0000001" / "model"
        # LiBai reads with this argument.
        loaded = oneflow.load(str(folder), global_src_rank=0)
        for name, tensor in source.place.tensors.items():
            assert np.array_equal(loaded[name].numpy(), tensor.bits())


@pytest.mark.parametrize("container", ["torch", "oneflow", "paddle"])
def test_a_whole_state_survives_under_canonical_names(container: str, tmp_path: Path) -> None:
    source = foreign.source_of(LIBAI, tmp_path)
    spec = foreign.spec_of_source(LIBAI, source)
    known = formats.FORMATS[container]
    norms = {n: t for n, t in source.tensors.items() if n.startswith("student") and "norm1" in n}
    moments = {f"optimizer.exp_avg.{name}": tensor for name, tensor in norms.items()}
    output = Output(known.layout(spec), dict(source.tensors), moments, spec)
    write(tmp_path / "w", known.output(output)[1], known.output(output)[0])
    again = recognise(reading.read(tmp_path / "w"))
    assert again.format is known and again.tensors.keys() == source.tensors.keys() | moments.keys()
    for name, tensor in {**source.tensors, **moments}.items():
        assert again.tensors[name].dtype == tensor.dtype
        assert np.array_equal(again.tensors[name].bits(), tensor.bits())


def test_oneflow_goes_on_from_what_is_written(tmp_path: Path) -> None:
    """OneFlow's AdamW with LiBai's two groups takes the moments, and counts on."""
    flow = pytest.importorskip("oneflow")
    source = foreign.source_of(LIBAI, tmp_path)
    spec = foreign.spec_of_source(LIBAI, source)
    state = formats.load_training_state(source.content.path, spec, print)
    written(source.format, state, spec, tmp_path / "run")
    folder = tmp_path / "run" / "model_0000000"
    model = flow.load(str(folder / "model"))
    tensors = source.place.tensors
    ours = {theirs: name for name, (theirs, *_) in source.renamed.origin.items()}
    groups = libai.groups(parameters(tensors, ours))
    params = {p.name: flow.nn.Parameter(model[p.name].clone()) for group in groups for p in group}
    optimizer = flow.optim.AdamW([{"params": [params[p.name] for p in g]} for g in groups], lr=0.5)
    optimizer.load_state_dict(flow.load(str(folder / "optimizer")))
    told = foreign.description(LIBAI)["optimizer"]
    found = optimizer.state_dict()
    assert found["state"]["step"] == told["step"] == 2
    assert [g["_options"]["weight_decay"] for g in found["param_groups"]] == [0.1, 0.0]
    numbered = [param.name for group in groups for param in group]
    for kind, hashes in told["moments"].items():
        for i, name in enumerate(numbered):
            moment = Stored.of(found["state"][i][kind].numpy())
            assert foreign.digest(moment)[2] == hashes[name], (kind, name)
