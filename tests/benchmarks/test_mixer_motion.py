"""The three statements of docs/mixer_theory.md, in numbers."""

import pytest

from benchmarks.mixer_motion import RANKS, first_step_difference, mixer_share, rank_share

WIDTH = 320


@pytest.mark.parametrize("rank", RANKS)
def test_the_first_step_of_sgd_is_loras(rank):
    assert first_step_difference(rank, WIDTH) < 1e-6


@pytest.mark.parametrize("rank", RANKS)
def test_adam_moves_the_product_through_m_by_a_share_of_one_over_the_root_of_the_rank(rank):
    assert mixer_share(rank, WIDTH) == pytest.approx(rank**-0.5, rel=0.25)


@pytest.mark.parametrize("rank", RANKS)
def test_a_butterfly_has_half_the_rank(rank):
    assert rank_share("butterfly", rank) == 0.5
    assert rank_share("orthogonal", rank) == 1
