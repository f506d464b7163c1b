"""The sliced Wasserstein distance of pictures: none between equals, much for noise and for blur."""

import random

import pytest
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from toybox.measures.swd import blur, distances, laplacian_pyramid, sliced_wasserstein
from toybox.render import render
from toybox.world import sample_scene


@pytest.fixture(scope="module")
def renders() -> tuple[Tensor, Tensor]:
    """Two times 24 renders, uint8 (24,64,64,3)."""
    rng = random.Random(3)
    return tuple(render([sample_scene(rng) for _ in range(24)], 64) for _ in range(2))


def blurred(pictures: Tensor) -> Tensor:
    return blur(pictures.permute(0, 3, 1, 2).float()).round().byte().permute(0, 2, 3, 1)


def test_points_that_are_moved_are_as_far_as_the_move_projected_on_the_directions():
    points = torch.randn(500, 2, generator=torch.Generator().manual_seed(1))
    far = sliced_wasserstein(points, points + torch.tensor([3.0, 4.0]), directions=4000)
    assert far == pytest.approx(5 * 2 / torch.pi, rel=0.03), "the mean of |cos| is 2/π"
    assert sliced_wasserstein(points, points[torch.randperm(500)]) == pytest.approx(0, abs=1e-6)


def test_the_levels_of_a_pyramid_add_up_to_the_picture():
    pictures = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    *levels, rest = laplacian_pyramid(pictures)
    assert [level.shape[-1] for level in (*levels, rest)] == [64, 32, 16]
    for level in reversed(levels):
        rest = interpolate(rest, scale_factor=2, mode="bilinear") + level
    torch.testing.assert_close(rest, pictures)


@pytest.mark.slow
def test_noise_is_farther_from_renders_than_other_renders_are(renders):
    references, others = renders
    noise = torch.randint(0, 256, references.shape, generator=torch.Generator().manual_seed(0)).byte()
    near, far = distances(others, references), distances(noise, references)
    assert set(near) == {"64_px", "32_px", "16_px", "mean"}
    assert far["mean"] > 2 * near["mean"] and far["64_px"] > 3 * near["64_px"]


@pytest.mark.slow
def test_blur_shows_at_the_finest_level_and_not_at_the_coarsest(renders):
    references, _ = renders
    same, smeared = distances(references, references), distances(blurred(references), references)
    assert smeared["64_px"] > 3 * same["64_px"]
    assert smeared["16_px"] < 1.5 * same["16_px"] + 5
