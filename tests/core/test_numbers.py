"""What counts as a number: no bool, no text, and for figures nothing that a float cannot hold."""

import math

import pytest

from dreambooth_moslora.core.errors import is_finite_number, is_number


@pytest.mark.parametrize("value", [0, -3, 0.5, 1e308])
def test_an_int_and_a_float_are_finite_numbers(value):
    assert is_number(value) and is_finite_number(value)


@pytest.mark.parametrize("value", [True, False, "1", None, [1]])
def test_a_bool_and_what_only_looks_like_a_number_are_none(value):
    assert not is_number(value) and not is_finite_number(value)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 10**400])
def test_what_no_float_can_hold_is_not_finite(value):
    assert is_number(value) and not is_finite_number(value)
