"""Numbers among JSON's values."""

import sys


def is_number(value: object) -> bool:
    """Return whether it is an int or a float, infinity and NaN included."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_finite_number(value: object) -> bool:
    """Return whether a float can hold it: no NaN, no infinity, no int beyond the largest float."""
    return is_number(value) and abs(value) <= sys.float_info.max
