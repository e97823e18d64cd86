"""Every operation of ``ops`` on every backend against float64 NumPy: value and gradient."""

import numpy as np
import pytest
from autograd import elementwise_grad
from conftest import TOLERANCE, assert_close
from support.native import differentiate

from triptych.core.reference import ops as reference

N, M, D = 6, 9, 5
RNG = np.random.default_rng(0)
LABELS = RNG.integers(0, M, N)
ORDER = np.array([4, 0, 5, 5, 1, 2, 0])
"""Rows left out and taken twice."""
TOKEN = np.array([3, 0, 0, 2])
CASES = {
    "l2_normalize": (lambda ops, x: ops.l2_normalize(x), [(N, D)]),
    "matmul": (lambda ops, a, b: ops.matmul(a, b), [(N, D), (D, M)]),
    "matmul_transposed": (lambda ops, a, b: ops.matmul(a, b, transpose_b=True), [(N, D), (M, D)]),
    "cross_entropy": (lambda ops, x: ops.cross_entropy(x, ops.labels(LABELS, x)), [(N, M)]),
    "row_dot": (lambda ops, a, b: ops.row_dot(a, b), [(N, D), (N, D)]),
    "gather_rows": (lambda ops, x: ops.gather_rows(x, ORDER), [(N, D, 2)]),
    "concat_columns": (lambda ops, a, b: ops.concat([a, b], axis=1), [(N, 1), (N, D)]),
    "l2_normalize_wide_eps": (lambda ops, x: ops.l2_normalize(x, eps=1e-5), [(N, D)]),
    "mean_tokens": (lambda ops, x: ops.mean_tokens(x, np.array([0, 2, 3])), [(N, 4, D)]),
    "gather_tokens": (lambda ops, x: ops.gather_tokens(x, 4 * ORDER[:4] + TOKEN), [(N, 4, D)]),
    "concat_rows": (lambda ops, a, b: ops.concat([a, b], axis=0), [(N, D), (M, D)]),
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
    assert_close(grad, elementwise_grad(reference.l2_normalize)(rows), 1e-9)


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


@pytest.mark.parametrize("precision", ["float64", "float32"])
@pytest.mark.parametrize("scale", [1.0, 40.0], ids=["near", "far"])
def test_divergence_from_a_target(backend, backend_name, scale, precision):
    """Targets get no gradient, and may be 0."""
    target = np.maximum(RNG.standard_normal((N, M)), 0.0) + np.eye(N, M)
    target = (target / target.sum(1, keepdims=True)).astype(precision)
    logits = (RNG.standard_normal((N, M)) * scale).astype(precision)

    def divergence(t, z):
        with backend.ops.no_grad():
            fixed = t * 1.0
        return backend.ops.kl_divergence(fixed, z) + (t * 0.0).sum()

    value, (none, grad) = differentiate(
        backend_name, divergence, target, logits, probe=np.ones((), precision)
    )
    t, z = target.astype(np.float64), logits.astype(np.float64)
    softmax = np.exp(z - z.max(1, keepdims=True))
    softmax /= softmax.sum(1, keepdims=True)
    tolerance = TOLERANCE[precision]["op"]
    assert_close(value, reference.kl_divergence(t, z), tolerance)
    assert_close(grad, (softmax * t.sum(1, keepdims=True) - t) / N, tolerance)
    assert not none.any()


@pytest.mark.parametrize("precision", ["float64", "float32"])
def test_codes_and_their_entropy(backend, backend_name, precision):
    """Rows near zero are divided by 1e-5, not by their length: OneFlow's own form is not exact."""
    tokens = RNG.standard_normal((N, 4, D)).astype(precision)
    tokens[0, 0] *= 1e-6
    words = reference.l2_normalize(RNG.standard_normal((M, D))).astype(precision)
    found = []

    def function(x, w, sharpness):
        codes, differences = backend.ops.soft_assign(x, w, sharpness)
        found.extend([codes.numpy(), differences.numpy()])
        found.append(backend.ops.entropy(codes[:, 0]).numpy())
        return x.sum() + w.sum() + sharpness.sum()

    inputs = tokens, words, np.array([20.0], precision)
    _, grads = differentiate(backend_name, function, *inputs, probe=np.ones((), precision))
    assert all((grad == 1.0).all() for grad in grads)  # none comes from the codes
    codes, differences = reference.soft_assign(*(x.astype(np.float64) for x in inputs))
    # A sharpness of 20 multiplies the rounding of the cosines.
    tolerance = 20 * TOLERANCE[precision]["op"]
    assert_close(found[0], codes, tolerance)
    assert_close(found[1], differences, tolerance)
    assert_close(found[2], reference.entropy(codes[:, 0]), tolerance)
    sure = np.eye(N, M)
    assert float(reference.entropy(sure)) == 0.0


LOGITS = [
    ([3.0, 1.0, 2.0, 0.0], 1.0, "the largest"),
    ([2.0, 3.0, 1.0, 0.0], 0.0, "the second"),
    ([1.0, 1.0, 1.0, 1.0], 0.0, "equal to all others"),
]


@pytest.mark.parametrize("precision", ["float64", "float32"])
def test_accuracy_counts_labels_among_the_largest(backend, backend_name, precision):
    rng = np.random.default_rng(2)
    logits, labels = rng.standard_normal((40, 9)), rng.integers(0, 9, 40)
    order = np.argsort(-logits, axis=1)
    want = [100.0 * np.mean((order[:, :k] == labels[:, None]).any(1)) for k in (1, 5)]
    for ops in (reference, backend.ops):
        got = accuracies(backend_name, ops, logits.astype(precision), labels)
        np.testing.assert_allclose(got, want, rtol=1e-6)
    assert 0 < want[0] < want[1] < 100


@pytest.mark.parametrize(("row", "top1", "what"), LOGITS, ids=[what for *_, what in LOGITS])
def test_a_tie_is_no_success(backend, backend_name, row, top1, what):
    for ops in (reference, backend.ops):
        got = accuracies(backend_name, ops, np.array([row]), np.array([0]))
        assert got[0] == 100.0 * top1


def accuracies(backend_name, ops, logits, labels):
    """Top-1 and top-5 as floats; the logits are ordinary outputs of a differentiated function."""
    found = []

    def function(x):
        found.extend(ops.accuracy(x, ops.labels(labels, x), top=(1, 5)))
        return x * 2.0

    if ops is reference:
        function(logits)
    else:
        _, (gradient,) = differentiate(backend_name, function, logits, probe=np.ones_like(logits))
        assert (gradient == 2.0).all()
    return [float(value) for value in found]
