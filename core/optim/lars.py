"""What differs between the forms of LARS (see ``LarsSpec.form``)."""

from triptych.core.config.spec import LarsSpec

TRUST_EPSILON = 1e-8
"""Added to the denominator of mmpretrain's trust ratio."""


def buffer_rates(spec: LarsSpec, lr: float) -> tuple[float, float]:
    """The factors with which a gradient enters the momentum buffer and the buffer a tensor.

    Their product is the learning rate.
    """
    return (lr, 1.0) if spec.form == "mmpretrain" else (1.0, lr)
