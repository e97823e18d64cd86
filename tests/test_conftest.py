"""The comparison that every parity test rests on must itself fail when it should."""

import numpy as np
import pytest
from conftest import assert_close, relative_error

VALUES = np.array([1.0, -2.0, 4.0])


def test_equal_and_nearly_equal_pass():
    assert_close(VALUES, VALUES, 0.0)
    assert_close(np.zeros(3), np.zeros(3), 0.0)
    assert_close(VALUES * (1 + 1e-13), VALUES, 1e-12)


@pytest.mark.parametrize(
    "wrong",
    [
        VALUES + np.array([5e-6, 0, 0]),
        -VALUES,
        np.full(3, np.nan),
        np.array([np.inf, -2.0, 4.0]),
        VALUES[:2],
        VALUES[:, None],
        VALUES[[1, 0, 2]],
        np.zeros(3),
    ],
)
def test_anything_else_fails(wrong):
    with pytest.raises(AssertionError):
        assert_close(wrong, VALUES, 1e-6)


def test_zero_expected_values_accept_only_zeros():
    with pytest.raises(AssertionError):
        assert_close([1e-30], [0.0], 1.0)


def test_the_error_is_relative_to_the_largest_expected_value():
    assert relative_error(VALUES + np.array([0.4, 0, 0]), VALUES) == pytest.approx(0.1)
