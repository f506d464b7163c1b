"""What the decoder is held to: the pictures that it drew at the start, with the contrast of renders."""

import pytest
import torch
from torch.nn.functional import avg_pool2d

from toybox.learning.sharpen_decoder import anchor_loss, contrast, contrast_gains, with_contrast


@pytest.fixture
def pictures() -> torch.Tensor:
    """Noise of several sizes in [-1, 1], (4,3,64,64)."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(4, 3, 64, 64, generator=generator) * 2 - 1
    return (noise + avg_pool2d(noise, 4).repeat_interleave(4, -1).repeat_interleave(4, -2)) / 2


def test_gains_of_one_change_nothing(pictures):
    torch.testing.assert_close(with_contrast(pictures, [1.0] * 4), pictures)


def test_pictures_get_the_contrast_of_others_and_keep_their_mean_colour(pictures):
    softer = 0.8 * pictures + 0.2 * avg_pool2d(pictures, 3, stride=1, padding=1)
    changed = with_contrast(pictures, contrast_gains(pictures, softer))
    assert contrast(pictures) != pytest.approx(contrast(softer), rel=0.1)
    assert contrast(changed) == pytest.approx(contrast(softer), rel=0.02)
    torch.testing.assert_close(changed.mean((2, 3)), pictures.mean((2, 3)), atol=0.02, rtol=0)


def test_a_picture_that_has_moved_is_told_by_the_anchor(pictures):
    assert anchor_loss(pictures, pictures) == 0
    assert anchor_loss(pictures.roll(4, -1), pictures) > anchor_loss(pictures.roll(1, -1), pictures) > 0
