"""Values from JSON: which are numbers."""

import sys


def is_number(value: object) -> bool:
    """An int or a float, infinity and NaN among them."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_finite_number(value: object) -> bool:
    """A number that a float holds: no NaN, no infinity, and no int beyond the largest float."""
    return is_number(value) and abs(value) <= sys.float_info.max
