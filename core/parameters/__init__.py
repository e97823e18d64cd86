"""The canonical tensors of a run: their names, shapes, initial values and trainability.

Names:
    ``student.encoder.``: the names of timm (ViT) or torchvision (ResNet).
    ``student.projector.``, ``student.predictor.``: the position of each layer, as in a sequential
        module (linear 0, norm 1, relu 2, linear 3, ...).
    ``teacher.``: encoder and projector, with the student's names.
    ``memory.``: the queue of keys or the codebook.

Layouts are those of PyTorch:
    linear: (out, in).
    convolution: (out, in, kh, kw).
"""

from dataclasses import replace

from triptych.core.config.spec import ModelSpec, RunSpec, VitSpec
from triptych.core.contracts import State
from triptych.core.parameters.heads import Head, head_flops, head_params
from triptych.core.parameters.initial import initial_value, sincos_2d
from triptych.core.parameters.moca import GENERATORS, decoder_spec, generator_widths
from triptych.core.parameters.param import ConvNorm, Init, Param, prefixed
from triptych.core.parameters.parts import Parts, parts, probe_width
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
    "probe_width",
    "sincos_2d",
    "stem",
    "table",
]


def encoder(spec: ModelSpec) -> list[Param]:
    """The tensors of an encoder without a classifier."""
    return vit_params(spec) if isinstance(spec, VitSpec) else resnet_params(spec)


def table(spec: RunSpec) -> list[Param]:
    """All tensors of student, teacher and memory, in this order; each group in forward order."""
    method = parts(spec)
    shared = prefixed("student.encoder.", encoder(spec.model))
    if method.frozen:
        shared = [replace(param, trainable=False) for param in shared]
    shared += prefixed("student.projector.", head_params(method.projector))
    predictor = prefixed("student.predictor.", head_params(method.predictor))
    student = [*shared, *predictor, *prefixed("student.", method.student)]
    followed = {"projector": shared, "everything": student, "nothing": []}[method.teacher]
    teacher = [
        replace(p, name=p.name.replace("student.", "teacher.", 1), trainable=False)
        for p in followed
    ]
    return [*student, *teacher, *prefixed("memory.", method.memory)]


def initial_state(spec: RunSpec) -> State:
    """The initial values of ``table(spec)``, drawn from the spec's seed.

    Each tensor has its own random stream, so a change to one layer leaves the values of the others
    as they are. The teacher starts as a copy of the student.

    Returns:
        float32 arrays by canonical name; counts are int64.
    """
    state: State = {}
    for param in table(spec):
        source = param.name.replace("teacher.", "student.", 1)
        state[param.name] = (
            state[source].copy() if source != param.name else initial_value(param, spec.seed)
        )
    return state
