"""The grid of processes, and the equation that its degrees must meet."""

import pytest
from support.native import tiny_spec

from triptych.core import cli, launch
from triptych.core.errors import UserError
from triptych.core.parallel.degrees import Degrees, Place, check_world


def test_processes_of_a_tensor_group_are_neighbours():
    degrees = Degrees(pipeline=2, data=3, tensor=4)
    assert degrees.world == 24
    assert degrees.place(17) == Place(pipeline=1, data=1, tensor=1)
    assert [degrees.rank(degrees.place(rank)) for rank in range(24)] == list(range(24))
    assert degrees.groups("tensor")[1] == [4, 5, 6, 7]
    assert degrees.groups("data")[1] == [1, 5, 9]
    assert degrees.groups("pipeline")[3] == [3, 15]
    for axis in ("pipeline", "data", "tensor"):
        assert sorted(rank for group in degrees.groups(axis) for rank in group) == list(range(24))


def test_the_equation_is_shown():
    spec = tiny_spec(parallel={"data": 2, "tensor": 4})
    check_world(spec, 8)
    with pytest.raises(UserError, match="data 2 x tensor 4 x pipeline 1 = 8, but the number of pr"):
        check_world(spec, 2)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({"tensor": 3}, "model.heads 4 is not divisible by 3"),
        ({"pipeline": 3}, "3 stages, but model.depth 2 blocks"),
        ({"data": 3}, "batch_size 8 is not divisible by data 3 x accumulate 1 x micro_batches 1"),
        ({"pipeline": 2, "micro_batches": 3}, "data 1 x accumulate 1 x micro_batches 3 = 3"),
    ],
)
def test_a_layout_that_the_architecture_refuses(layout, message):
    with pytest.raises(ValueError, match=message):
        tiny_spec(parallel=layout)


@pytest.mark.parametrize(
    ("case", "sections", "message"),
    [
        ("moco_v1_resnet18", {"parallel": {"tensor": 2}}, "only a ViT is divided; resnet18 needs"),
        ("moco_v1_resnet18", {"parallel": {"recompute": True}}, "only a ViT has blocks"),
        ("moca_vit", {"parallel": {"tensor": 4}}, "method.decoder_heads 3 is not divisible by 4"),
        (
            "moco_v1_resnet18",
            {
                "parallel": {"data": 4},
                "batch_norm": {"virtual_ranks": 3},
                "train": {"batch_size": 12},
            },
            "4 copies do not divide 3 batch_norm.virtual_ranks",
        ),
    ],
)
def test_a_layout_that_a_method_refuses(case, sections, message):
    with pytest.raises(ValueError, match=message):
        tiny_spec(case=case, **sections)


@pytest.mark.parametrize("axis", ["data", "tensor", "pipeline"])
def test_a_layout_without_its_processes_is_refused_before_anything_is_written(
    axis, tmp_path, capsys
):
    output = str(tmp_path / "run")
    command = ["train", "-c", "moco_v3/digits", "--backend", "torch", "--output", output]
    assert cli.main([*command, "-o", f"parallel.{axis}=2"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: parallel: data ") and f"{axis} 2" in error
    assert error.endswith(" = 2, but the number of processes is 1; they must be equal\n")
    assert not (tmp_path / "run").exists()


def test_the_reference_refuses_it_too():
    spec = tiny_spec(parallel={"recompute": True})
    with pytest.raises(UserError, match="recompute: true: numpy does not support it"):
        launch.open_engine(spec, launch.REFERENCE, {})
