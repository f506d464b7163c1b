"""The sharpness of a toy: that of its own pixels alone."""

import random

import torch

from toybox.data.renders import to_pixels, to_uint8
from toybox.measures.sharpness import sharpness
from toybox.measures.swd import blur
from toybox.render import render, toy_masks
from toybox.world import sample_scene

SCENES = [sample_scene(random.Random(seed)) for seed in range(3)]


def test_a_blurred_toy_has_less_and_a_sharpened_one_more():
    images, masks = render(SCENES), toy_masks(SCENES, 128)
    pixels = to_pixels(images)
    soft = blur(pixels)
    true = sharpness(images, masks)
    assert (sharpness(to_uint8(soft), masks) < 0.75 * true).all()
    assert (sharpness(to_uint8((2 * pixels - soft).clamp(-1, 1)), masks) > 1.2 * true).all()


def test_what_is_beside_the_toy_does_not_count():
    images, masks = render(SCENES), toy_masks(SCENES, 128)
    inner = -torch.nn.functional.max_pool2d(-masks[:, None].float(), 25, 1, 12)[:, 0] > 0
    inner[:, 0] = False
    noisy = torch.where(masks[..., None], images, torch.randint_like(images, 256))
    assert inner.any()
    torch.testing.assert_close(sharpness(noisy, inner), sharpness(images, inner))
    assert (sharpness(images, torch.zeros_like(masks)) == 0).all()
