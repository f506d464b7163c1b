"""The rank among look-alikes against what is known of rendered toys."""

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from dreambooth_moslora.disk.paths import get_assets_folder
from dreambooth_moslora.evaluation.metrics import load_encoders
from toybox.make_subjects import FOLDER, load
from toybox.measures.look_alikes import (
    compute_rank,
    compute_spearman,
    correlate_subject,
    load_photos,
)


def test_the_rank_is_1_where_all_photos_come_first_and_0_where_all_others_do():
    photos = normalize(torch.tensor([[1.0, 0.1], [1.0, 0.2]]), dim=1)
    look_alikes = normalize(torch.tensor([[0.1, 1.0], [0.2, 1.0], [0.3, 1.0]]), dim=1)
    generated = torch.cat([photos[:1], look_alikes[:1]])
    assert compute_rank(generated, photos, look_alikes).tolist() == [1.0, 0.0]
    # A photo, a look-alike, and what is nearer to one of two photos alone
    assert compute_rank(
        photos[:1], photos[:1], torch.cat([photos[:1], look_alikes[:1]])
    ).tolist() == [0.5]


def test_spearman_asks_for_the_order_alone_and_shares_ranks_of_equal_values():
    values = np.array([1.0, 2.0, 3.0, 10.0])
    assert compute_spearman(values, values**3) == pytest.approx(1)
    assert compute_spearman(values, -values) == pytest.approx(-1)
    # Ranks 1, 2.5, 2.5, 4 beside 1, 2, 3, 4
    assert compute_spearman(np.array([1.0, 2.0, 2.0, 3.0]), values) == pytest.approx(
        0.9487, abs=1e-4
    )


@pytest.mark.slow
def test_both_measures_follow_the_truth_of_rendered_toys():
    encoders = load_encoders(get_assets_folder() / "toy-sdxl")
    correlation = correlate_subject(load("duck").toy, load_photos(FOLDER / "duck"), encoders, 24)
    assert correlation.dino > 0.5 and correlation.rank > 0.5
