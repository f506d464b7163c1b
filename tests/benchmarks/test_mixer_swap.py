"""Swapping mixers on a loaded basis."""

import pytest

from benchmarks.mixer_swap import measure


@pytest.mark.slow
def test_a_swap_takes_a_fraction_of_loading_the_basis(tiny_base):
    found = measure(str(tiny_base), 4, 20, ["to_q", "conv1"])
    assert 0 < found["swap_ms"] < 100 * found["basis_sec"] and found["kb"] < 10
