"""The fast path is as near to PEFT's layers as PEFT's are to fp64, in each number format of the base."""

import pytest

from benchmarks.fast_path_table import compare

TO_FP64 = "PEFT to fp64"


@pytest.mark.parametrize(
    ("base", "targets", "hows"),
    [
        ("fp32", "with conv", ("plain",)),
        ("bf16", "q/k/v together", ("recomputed", "text cached")),
        pytest.param("fp16", "with conv", ("plain", "recomputed"), marks=pytest.mark.slow),
    ],
)
def test_it_differs_by_no_more_than_rounding(base, targets, hows):
    found = dict(compare(base, targets, hows))
    assert max(found[TO_FP64]) > 0
    for how in hows:
        for far, rounding in zip(found[how], found[TO_FP64]):
            assert 0 < far <= 4 * rounding, how


def test_4_bit_weights_are_those_of_pefts_layers():
    """They are packed and made dense alike: what differs is the rounding of bf16."""
    output, gradient = dict(compare("NF4", "q/k/v together", ("plain",)))["plain"]
    assert 0 < output < 0.03 and 0 < gradient < 0.3


@pytest.mark.slow
def test_8_bit_layers_keep_pefts_path():
    assert dict(compare("int8", "q/k/v together", ("plain", "recomputed"))) == {
        "plain": (0.0, 0.0),
        "recomputed": (0.0, 0.0),
    }
