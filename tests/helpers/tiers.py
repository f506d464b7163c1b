"""Which rows of a table each run tests, and which the long tier alone."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def slow_but(fast: Collection[str], names: Iterable[str]) -> list[Any]:
    """Parameters of `parametrize`: rows named in `fast` in each run, the others by `-m slow`."""
    rows = []
    for name in names:
        rows.append(name if name in fast else pytest.param(name, marks=pytest.mark.slow))
    return rows
