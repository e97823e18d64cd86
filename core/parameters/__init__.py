"""The canonical tensors of a run: names, shapes, initial values and who is trained.

Names are timm's (ViT) or torchvision's (ResNet) under ``student.encoder.``; heads count their
layers as in a sequential module (linear 0, norm 1, relu 2, linear 3, ...). Layouts are PyTorch's:
linear (out, in), convolution (out, in, kh, kw). The teacher repeats encoder and projector under
``teacher.``; a queue of keys, or a codebook, is under ``memory.``.
"""

from dataclasses import replace

from triptych.core.config.spec import ModelSpec, RunSpec, VitSpec
from triptych.core.contracts import State
from triptych.core.parameters.heads import Head, head_flops, head_params
from triptych.core.parameters.initial import initial_value, sincos_2d
from triptych.core.parameters.moca import GENERATORS, decoder_spec, generator_widths
from triptych.core.parameters.param import ConvNorm, Init, Param, prefixed
from triptych.core.parameters.parts import Parts, parts
from triptych.core.parameters.resnet import ResidualBlock, blocks, resnet_params, stem
from triptych.core.parameters.vit import conv_stem, vit_params

__all__ = [
    "GENERATORS",
    "ConvNorm",
    "Head",
    "Init",
    "Param",
    "Parts",
    "ResidualBlock",
    "blocks",
    "conv_stem",
    "decoder_spec",
    "encoder",
    "generator_widths",
    "head_flops",
    "initial_state",
    "initial_value",
    "parts",
    "sincos_2d",
    "stem",
    "table",
]


def encoder(spec: ModelSpec) -> list[Param]:
    """The tensors of an encoder, without the head of a classifier."""
    return vit_params(spec) if isinstance(spec, VitSpec) else resnet_params(spec)


def table(spec: RunSpec) -> list[Param]:
    """All tensors of student, teacher and memory, each in forward order."""
    own = parts(spec)
    both = prefixed("student.encoder.", encoder(spec.model))
    both += prefixed("student.projector.", head_params(own.projector))
    predictor = prefixed("student.predictor.", head_params(own.predictor))
    teacher = [
        replace(p, name=p.name.replace("student.", "teacher.", 1), trainable=False) for p in both
    ]
    student = [*both, *predictor, *prefixed("student.", own.student)]
    return [*student, *teacher, *prefixed("memory.", own.memory)]


def initial_state(spec: RunSpec) -> State:
    """Initial values of ``table(spec)`` from the spec's seed, float32 (counts int64).

    Every tensor has a stream of its own, so a change of architecture moves no other tensor. The
    teacher starts as a copy of the student.
    """
    state: State = {}
    for param in table(spec):
        source = param.name.replace("teacher.", "student.", 1)
        state[param.name] = (
            state[source].copy() if source != param.name else initial_value(param, spec.seed)
        )
    return state
