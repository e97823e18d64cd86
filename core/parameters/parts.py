"""The parts that each method adds to its encoder: heads, further networks and memory."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, cast

from triptych.core.config.spec import (
    FinetuneSpec,
    LinearSpec,
    MocaSpec,
    MocoV1Spec,
    MocoV2Spec,
    MocoV3Spec,
    QueueSpec,
    RunSpec,
    SupervisedSpec,
    VitSpec,
)
from triptych.core.parameters.heads import Head, normed, plain
from triptych.core.parameters.moca import codebook, moca_params
from triptych.core.parameters.param import COUNT, Init, Param, linear

NO_HEAD = Head()


@dataclass(frozen=True)
class Parts:
    """The parts of a method besides its encoder.

    Attributes:
        projector: head after the encoder, in student and teacher.
        predictor: head after the student's projector.
        student: tensors of further networks that only the student has, in forward order.
        memory: tensors without gradient that persist from step to step.
        teacher: what the teacher has of the student: encoder and projector, everything, or nothing
            (there is no teacher).
        frozen: whether the encoder has no gradient.
    """

    projector: Head = NO_HEAD
    predictor: Head = NO_HEAD
    student: tuple[Param, ...] = ()
    memory: tuple[Param, ...] = ()
    teacher: Literal["projector", "everything", "nothing"] = "projector"
    frozen: bool = False


def parts(spec: RunSpec) -> Parts:
    """The parts of the spec's method."""
    return PARTS[spec.method.name](spec)


def _moco_v1(spec: RunSpec) -> Parts:
    method = cast(MocoV1Spec, spec.method)
    projector = plain([spec.model.features, method.output_dim], method.head_init)
    return Parts(projector, memory=_queue(method))


def _moco_v2(spec: RunSpec) -> Parts:
    method, width = cast(MocoV2Spec, spec.method), spec.model.features
    projector = plain([width, method.hidden_dim or width, method.output_dim], method.head_init)
    return Parts(projector, memory=_queue(method))


def _moco_v3(spec: RunSpec) -> Parts:
    method = cast(MocoV3Spec, spec.method)
    out = method.output_dim
    last: Literal["norm", "plain_norm"] = "norm" if method.last_norm_affine else "plain_norm"
    hidden = [method.hidden_dim] * (method.projector_layers - 1)
    projector = normed([spec.model.features, *hidden, out], last)
    hidden = [method.predictor_hidden_dim or method.hidden_dim] * (method.predictor_layers - 1)
    predictor = normed([out, *hidden, out], last if method.predictor_last_norm else None)
    return Parts(projector, predictor)


def _moca(spec: RunSpec) -> Parts:
    # The check of the spec refuses other encoders.
    model, method = cast(VitSpec, spec.model), cast(MocaSpec, spec.method)
    student, memory = moca_params(model, method), codebook(model, method)
    return Parts(student=tuple(student), memory=tuple(memory))


def probe_width(spec: RunSpec) -> int:
    """Number of features of an image that the classifiers of a linear probe get."""
    method = cast(LinearSpec, spec.method)
    tokens = {"cls": method.blocks, "mean": 1, "both": method.blocks + 1}
    return tokens[method.pooling] * spec.model.features


def _linear(spec: RunSpec) -> Parts:
    method, width = cast(LinearSpec, spec.method), probe_width(spec)
    count = len(method.probes)
    names = [f"classifier.{i}" for i in range(count)] if count > 1 else ["classifier"]
    heads = [param for name in names for param in _classifier(name, width, method)]
    return Parts(student=tuple(heads), teacher="nothing", frozen=True)


def _finetune(spec: RunSpec) -> Parts:
    method = cast(FinetuneSpec, spec.method)
    head = _classifier("classifier", spec.model.features, method)
    teacher: Literal["everything", "nothing"] = (
        "nothing" if method.momentum is None else "everything"
    )
    return Parts(student=tuple(head), teacher=teacher)


def _classifier(name: str, width: int, method: SupervisedSpec) -> list[Param]:
    return linear(name, width, method.classes, Init("normal", method.head_std))


def _queue(method: QueueSpec) -> tuple[Param, ...]:
    """The queue, (output_dim, queue_size) with a key in each column, and its pointer."""
    shape = (method.output_dim, method.queue_size)
    return (
        Param("queue", shape, Init("unit_columns"), trainable=False, buffer=True),
        Param("pointer", (), COUNT, trainable=False, buffer=True),
    )


PARTS: dict[str, Callable[[RunSpec], Parts]] = {
    "moco_v1": _moco_v1,
    "moco_v2": _moco_v2,
    "moco_v3": _moco_v3,
    "moca": _moca,
    "linear": _linear,
    "finetune": _finetune,
}
