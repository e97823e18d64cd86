"""Networks for timm, DeiT, Hugging Face and detectron2: what is read, and what is written."""

import json
import pickle
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import foreign

from triptych.core import formats
from triptych.core.config.spec import InitSpec, RunSpec
from triptych.core.errors import UserError
from triptych.core.files import reading
from triptych.core.files.saving import write
from triptych.core.files.tree import Content, Node, Record, Stored
from triptych.core.formats import FORMATS
from triptych.core.formats.conversion import Request, plan
from triptych.core.formats.detection import Source, recognise
from triptych.core.formats.format import Output
from triptych.core.formats.specs import spec_of
from triptych.core.parameters import initial_state

FILES = foreign.FILES
POOLER = "huggingface_vit_model_pooler_bin"
VIT = {"name": "vit", "width": 16, "depth": 2, "heads": 4, "image_size": 16, "patch_size": 4}


def content(tree: Node, name: str = "w.pth", container: str = "torch zip") -> Content:
    return Content(Path(name), container, tree)


def refusal(found: Content, **how: Any) -> str:
    with pytest.raises(UserError) as caught:
        recognise(found, **how)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def vit_spec(classes: int = 5, pooling: str = "cls", **model: object) -> RunSpec:
    method = {"name": "finetune", "classes": classes, "pooling": pooling}
    sections = {"model": {**VIT, **model}, "method": method, "train": {"steps": 1}}
    return RunSpec.model_validate(sections)


def stored(spec: RunSpec) -> dict[str, Stored]:
    """A state with other values in every tensor."""
    rng = np.random.default_rng(0)
    return {
        name: Stored.of(rng.standard_normal(array.shape).astype(np.float32))
        for name, array in initial_state(spec).items()
    }


def written(target: str, path: Path, spec: RunSpec, tensors: dict[str, Stored], kind: str) -> Path:
    """Canonical tensors in a file of a system."""
    form = FORMATS[target]
    layout = next(x for x in form.layouts if x.kind == kind and x.encoder in ("", "vit"))
    names, left = layout.table.from_canonical(tensors, {"model.heads": 4})
    assert not left
    container, tree = form.output(Output(layout, names, {}, spec, folder=not path.suffix))
    write(path, tree, container)
    return path


def same(source: Source, tensors: dict[str, Stored]) -> bool:
    return source.tensors.keys() == tensors.keys() and all(
        np.array_equal(source.tensors[name].bits(), tensor.bits())
        for name, tensor in tensors.items()
    )


# ------------------------------------------------------------------------------------ timm and DeiT


def timm_tree(**beside: Node) -> Node:
    spec = vit_spec()
    names, _ = FORMATS["timm"].layouts[0].table.from_canonical(stored(spec), {})
    return {"state_dict": names, **beside}


def test_timm_states_heads_and_size_in_arguments_or_config() -> None:
    arguments = Record("argparse.Namespace", {"img_size": 16, "model_kwargs": {"num_heads": 2}})
    training = recognise(content(timm_tree(args=arguments, version=2)))
    assert training.format.name == "timm"
    assert spec_of(training).model.heads == 2
    config = {"model_args": {"num_heads": 8, "img_size": [8, 32]}, "architecture": "vit_huge"}
    tensors = timm_tree()["state_dict"]
    hub = recognise(content({"config.json": config, "model.safetensors": tensors}, "f", "folder"))
    model = spec_of(hub).model
    assert (model.heads, model.size) == (8, (8, 32))


def test_a_size_that_does_not_fit_the_position_table_is_not_believed() -> None:
    arguments = Record("argparse.Namespace", {"img_size": 224})
    source = recognise(content(timm_tree(args=arguments)))
    assert spec_of(source, ["model.heads=4"]).model.size == (16, 16)
    with pytest.raises(UserError, match=r"the file does not say model.heads; give .*=NUMBER"):
        spec_of(source)


def test_what_is_no_number_is_no_fact() -> None:
    for heads in (Stored.of(np.array(2)), {"a": 2}, b"2", None, [[2]]):
        arguments = Record("argparse.Namespace", {"model_kwargs": {"num_heads": heads}})
        assert "model.heads" not in recognise(content(timm_tree(args=arguments))).facts
    arguments = Record("argparse.Namespace", {"model_kwargs": {"num_heads": "many"}})
    with pytest.raises(UserError, match=r"model.heads: 'many': expected an integer"):
        spec_of(recognise(content(timm_tree(args=arguments))))


@pytest.mark.parametrize("name", ["pos_embed", "cls_token", "patch_embed.proj.weight"])
@pytest.mark.parametrize("shape", [(), (0,), (1, 0, 0), (2, 2, 2, 2, 2)])
def test_a_misshapen_tensor_is_no_crash(name: str, shape: tuple[int, ...]) -> None:
    tensors = {**timm_tree()["state_dict"], name: Stored.of(np.zeros(shape, np.float32))}
    with suppress(UserError):
        spec_of(recognise(content({"state_dict": tensors})), ["model.heads=4"])


@pytest.mark.parametrize("shape", [(), (0,), (0, 0, 0, 0)])
def test_a_misshapen_convolution_is_named(shape: tuple[int, ...]) -> None:
    tensors = {"conv1.weight": Stored.of(np.zeros(shape)), "fc.weight": Stored.of(np.ones((5, 8))),
               "layer1.0.conv1.weight": Stored.of(np.ones((2, 2, 3, 3)))}  # fmt: skip
    with pytest.raises(UserError, match=r"conv1.weight \(.*\): expected 4 dimensions, none of"):
        spec_of(recognise(content({"state_dict": tensors})))


def test_a_folder_with_the_weights_twice_is_read_once() -> None:
    tensors = timm_tree()["state_dict"]
    tree = {"model.safetensors": tensors, "pytorch_model.bin": tensors}
    assert recognise(content(tree, "f", "folder")).place.name == "model.safetensors"


@pytest.mark.parametrize("fc_norm", [False, True])
@pytest.mark.parametrize("name", ["w.pth", "hub"])
def test_timm_opens_what_is_written_for_it(tmp_path: Path, name: str, *, fc_norm: bool) -> None:
    timm = pytest.importorskip("timm")
    spec = vit_spec(pooling="mean" if fc_norm else "cls", fc_norm=fc_norm)
    tensors = stored(spec)
    path = written("timm", tmp_path / name, spec, tensors, "classifier")
    if path.is_dir():
        model = timm.create_model(f"local-dir:{path}", pretrained=True)
    else:
        pool = "avg" if fc_norm else "token"
        model = timm.create_model(
            "vit_tiny_patch16_224", checkpoint_path=str(path), img_size=16, patch_size=4,
            embed_dim=16, depth=2, num_heads=4, num_classes=5, global_pool=pool,
        )  # fmt: skip
    found = {name: value.numpy() for name, value in model.state_dict().items()}
    source = recognise(reading.read(path))
    assert found.keys() == source.place.tensors.keys() and same(source, tensors)
    assert all(np.array_equal(found[n], t.bits()) for n, t in source.place.tensors.items())
    assert model.blocks[0].attn.num_heads == 4


def test_a_deit_checkpoint_has_plain_and_averaged_weights() -> None:
    tensors = timm_tree()["state_dict"]
    other = {name: Stored.of(tensor.array() + 1) for name, tensor in tensors.items()}
    tree = {"model": tensors, "model_ema": other, "lr_scheduler": {}, "scaler": {}, "epoch": 3}
    assert "say which: init.average" in refusal(content(tree))
    plain, averaged = (recognise(content(tree), average=value) for value in (False, True))
    assert plain.format.name == averaged.format.name == "deit"
    token = "student.encoder.cls_token"
    assert np.array_equal(plain.tensors[token].array() + 1, averaged.tensors[token].array())


def distilled() -> tuple[Content, dict[str, Stored]]:
    """A distilled DeiT, and its encoder without the second token."""
    tensors = timm_tree()["state_dict"]
    rng = np.random.default_rng(1)
    table = tensors["pos_embed"].array()
    row, token = rng.standard_normal((2, 1, 1, 16)).astype(np.float32)
    longer = np.concatenate([table[:, :1], row, table[:, 1:]], axis=1)
    more = {"dist_token": token, "pos_embed": longer, "head_dist.weight": np.ones((5, 16)),
            "head_dist.bias": np.ones(5)}  # fmt: skip
    whole = {**tensors, **{name: Stored.of(array) for name, array in more.items()}}
    return content({"model": whole}), tensors


def test_a_distilled_deit_goes_there_and_back() -> None:
    file, _ = distilled()
    source = recognise(file)
    assert (source.format.name, source.layout.kind) == ("deit", "distilled")
    assert source.tensors["student.encoder.pos_embed"].shape == (1, 17, 16)
    names, _ = source.layout.table.from_canonical(source.tensors, {})
    both = {**names, **source.renamed.unknown}
    _, tree = FORMATS["deit"].output(Output(source.layout, both, {}, vit_spec()))
    before = file.tree["model"]
    assert tree["model"].keys() == before.keys()
    assert all(np.array_equal(before[n].bits(), t.bits()) for n, t in tree["model"].items())


def test_a_distilled_deit_is_an_encoder_only_if_what_is_left_out_is_named(tmp_path: Path) -> None:
    file, tensors = distilled()
    path, spec = tmp_path / "w.pth", vit_spec()
    write(path, file.tree, "torch")
    with pytest.raises(UserError) as caught:
        formats.load_encoder(path, spec, InitSpec())
    line = str(caught.value)
    assert line.startswith(f"{path}: a distilled DeiT with a second token, on which all features")
    left_out = ["dist_token", "pos_embed.dist_token", "head_dist.", "head."]
    assert "to [dist_token, head_dist.weight, head_dist.bias, pos_embed.dist_token, head." in line
    init = InitSpec.model_validate({"allow_unused": left_out})
    loaded = formats.load_encoder(path, spec, init)
    table = tensors["pos_embed"].array()
    assert np.array_equal(loaded["student.encoder.pos_embed"], table)
    init = InitSpec.model_validate({"allow_unused": left_out[1:]})
    with pytest.raises(UserError, match="a distilled DeiT"):
        formats.load_encoder(path, spec, init)


# ------------------------------------------------------------------------------------ Hugging Face


def test_what_hugging_face_states_is_not_asked_for() -> None:
    source = recognise(reading.read(FILES / POOLER))
    model = spec_of(source).model
    assert (model.heads, model.layer_norm_eps, model.image_size) == (4, 1e-12, 32)
    assert [*source.renamed.unknown] == ["pooler.dense.weight", "pooler.dense.bias"]
    alone = content(source.content.tree["pytorch_model.bin"])
    with pytest.raises(UserError, match=r"does not say model.heads and model.layer_norm_eps"):
        spec_of(recognise(alone))


def test_another_activation_is_refused() -> None:
    file = reading.read(FILES / POOLER)
    config = {**file.tree["config.json"], "hidden_act": "relu"}
    line = refusal(replace(file, tree={**file.tree, "config.json": config}))
    assert line.endswith("huggingface: config.json: hidden_act is 'relu'; expected 'gelu'")


@pytest.mark.parametrize(
    ("kind", "architecture", "name"),
    [
        ("classifier", "ViTForImageClassification", "vit.layernorm.weight"),
        ("encoder", "ViTModel", "layernorm.weight"),
    ],
)
def test_a_folder_for_hugging_face_says_what_its_model_is(
    tmp_path: Path, kind: str, architecture: str, name: str
) -> None:
    spec = vit_spec(image_size=(8, 24), layer_norm_eps=1e-5)
    tensors = {n: t for n, t in stored(spec).items() if kind == "classifier" or "encoder" in n}
    path = written("huggingface", tmp_path / "hf", spec, tensors, kind)
    source = recognise(reading.read(path))
    assert same(source, tensors) and name in source.place.tensors
    assert spec_of(source).model == spec.model
    config = json.loads((path / "config.json").read_text())
    assert config["architectures"] == [architecture]
    assert config["intermediate_size"] == 64 and len(config.get("id2label", {})) in (0, 5)
    assert config["image_size"] == [8, 24]


def test_weights_of_hugging_face_in_several_files() -> None:
    file = reading.read(FILES / POOLER)
    tensors = file.tree["pytorch_model.bin"]
    names = [*tensors]
    parts = {f"pytorch_model-0000{i}-of-00002.bin": {n: tensors[n] for n in half}
             for i, half in enumerate((names[:20], names[20:]), 1)}  # fmt: skip
    tree = {"config.json": file.tree["config.json"], **parts}
    source = recognise(content(tree, "f", "folder"))
    assert same(source, recognise(file).tensors)


def test_encoders_that_no_vit_of_hugging_face_has_are_refused(tmp_path: Path) -> None:
    spec = vit_spec(pooling="mean", fc_norm=True)
    with pytest.raises(UserError, match="this encoder has not"):
        FORMATS["huggingface"].output(Output(FORMATS["huggingface"].layouts[0], {}, {}, spec))


def test_an_epsilon_that_the_target_has_in_its_code_is_said() -> None:
    wishes = {"parts": ["encoder"], "allow_unused": ["pooler."]}
    notes = {
        to: plan(FILES / POOLER, Request(to, **wishes)).notes for to in ("timm", "huggingface")
    }
    assert notes["huggingface"] == []
    assert notes["timm"][0].startswith("model.layer_norm_eps: 1e-12; timm (huggingface/pytorch-")


# ------------------------------------------------------------------------------------- detectron2


def test_a_detector_is_named() -> None:
    names = ("backbone.stem.conv1.weight", "backbone.res2.0.conv1.norm.bias",
             "proposal_generator.rpn_head.conv.weight", "roi_heads.res5.0.weight")  # fmt: skip
    tree = {"model": {name: Stored.of(np.ones(3)) for name in names}, "iteration": 3}
    line = refusal(content(tree))
    assert "holds a detector (proposal_generator.rpn_head.conv.weight), not an encoder" in line


def test_detectron2_opens_a_pickle_of_arrays(tmp_path: Path) -> None:
    source = recognise(reading.read(FILES / "detectron2_moco_v2_resnet18_numpy2.pkl"))
    names, _ = source.layout.table.from_canonical(source.tensors, {})
    container, tree = source.format.output(Output(source.layout, names, {}, vit_spec()))
    write(tmp_path / "w.pkl", tree, container)
    with open(tmp_path / "w.pkl", "rb") as stream:
        data = pickle.load(stream, encoding="latin1")
    assert data["__author__"] and data["matching_heuristics"] is True
    assert {name: type(value) for name, value in data["model"].items()} == dict.fromkeys(
        source.place.tensors, np.ndarray
    )
    assert np.array_equal(data["model"]["stem.fc.2.bias"], names["stem.fc.2.bias"].bits())
