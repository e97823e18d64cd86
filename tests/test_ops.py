"""Every operation of ``ops`` on every backend against float64 NumPy: value and gradient."""

import numpy as np
import pytest
from autograd import elementwise_grad
from conftest import TOLERANCE, assert_close
from native import differentiate

from triptych.core.reference import ops as reference

N, M, D = 6, 9, 5
RNG = np.random.default_rng(0)
LABELS = RNG.integers(0, M, N)
CASES = {
    "l2_normalize": (lambda ops, x: ops.l2_normalize(x), [(N, D)]),
    "matmul": (lambda ops, a, b: ops.matmul(a, b), [(N, D), (D, M)]),
    "matmul_transposed": (lambda ops, a, b: ops.matmul(a, b, transpose_b=True), [(N, D), (M, D)]),
    "cross_entropy": (lambda ops, x: ops.cross_entropy(x, ops.labels(LABELS, x)), [(N, M)]),
}


def expected(case: str, inputs: list[np.ndarray], probe: np.ndarray):
    function, _ = CASES[case]
    value = function(reference, *inputs)
    grads = [
        elementwise_grad(lambda *a: np.sum(function(reference, *a) * probe), i)(*inputs)
        for i in range(len(inputs))
    ]
    return value, grads


@pytest.mark.parametrize("precision", ["float64", "float32"])
@pytest.mark.parametrize("scale", [1.0, 40.0], ids=["near", "far"])
@pytest.mark.parametrize("case", CASES)
def test_value_and_gradient(backend, backend_name, case, scale, precision):
    # "far": margins beyond 64, where Paddle's own cross-entropy saturates.
    function, shapes = CASES[case]
    inputs = [(RNG.standard_normal(s) * scale).astype(precision) for s in shapes]
    probe = RNG.standard_normal(function(reference, *inputs).shape).astype(precision)
    value, grads = differentiate(
        backend_name, lambda *x: function(backend.ops, *x), *inputs, probe=probe
    )
    want, want_grads = expected(case, [x.astype(np.float64) for x in inputs], probe)
    tolerance = TOLERANCE[precision]["op"]
    assert value.dtype == precision
    assert_close(value, want, tolerance, case)
    for grad, want_grad in zip(grads, want_grads, strict=True):
        assert_close(grad, want_grad, tolerance, f"gradient of {case}")


def test_normalising_a_zero_row_gives_zeros(backend, backend_name):
    rows = np.zeros((2, D))
    rows[1] = 3.0
    value, (grad,) = differentiate(
        backend_name, backend.ops.l2_normalize, rows, probe=np.ones((2, D))
    )
    assert_close(value, reference.l2_normalize(rows), 1e-15)
    # x / max(|x|, eps) has the slope 1 / eps at zero.
    assert_close(grad[0], np.full(D, 1e12), 1e-9)


@pytest.mark.parametrize("labels", [[0, M], [-1, 0]], ids=["too large", "negative"])
def test_labels_out_of_range_are_refused(backend, backend_name, labels):
    logits = np.zeros((2, M))
    with pytest.raises((ValueError, IndexError), match=r"label|out of bounds"):
        differentiate(
            backend_name,
            lambda x: backend.ops.cross_entropy(x, backend.ops.labels(np.array(labels), x)),
            logits,
            probe=np.ones(()),
        )


def test_nothing_is_recorded_inside_no_grad(backend, backend_name):
    def half(x):
        with backend.ops.no_grad():
            constant = backend.ops.l2_normalize(x)
        return x * constant

    x = RNG.standard_normal((N, D))
    _, (grad,) = differentiate(backend_name, half, x, probe=np.ones((N, D)))
    assert_close(grad, reference.l2_normalize(x), 1e-14)
