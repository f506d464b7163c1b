"""Crop plans: inside the photo, drawn evenly, equal to resizing first."""

import random

import numpy as np
import pytest
from diffusers.training_utils import find_nearest_bucket, parse_buckets_string
from PIL import Image

from dreambooth_moslora.core import UserError
from dreambooth_moslora.photos.photo_file import FILTERS, CropPlan, CropRule, apply_crop, crop_rule, resized_size
from dreambooth_moslora.settings.table import TrainConfig


def smooth(size_px, seed=0):
    height, width = size_px
    small = np.random.default_rng(seed).integers(0, 255, (7, 9, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def drawn(size_px, count: int = 400, seed: int = 0, **options) -> list[CropPlan]:
    return [CropRule(32, **options).plan(size_px, random.Random(seed + n)) for n in range(count)]


def assert_close(found: Image.Image, expected: Image.Image) -> None:
    """But for the edge, where a filter sees more of the photo."""
    difference = np.asarray(found, dtype=int) - np.asarray(expected, dtype=int)
    assert np.abs(difference)[3:-3, 3:-3].max() <= 1


@pytest.mark.parametrize("size_px", [(64, 64), (100, 333), (333, 100), (65, 64), (5000, 31)])
def test_plans_lie_inside_the_resized_photo_and_reach_both_ends(size_px):
    """A flip changes nothing else."""
    resized = resized_size(size_px, (32, 32))
    assert min(resized) == 32
    plans = drawn(size_px, random_flip=True)
    corners = [plan.crop_top_left for plan in plans]
    assert corners == [plan.crop_top_left for plan in drawn(size_px)]
    for side, starts in zip(resized, zip(*corners), strict=True):
        assert min(starts) <= (side - 32) * 0.02 and (side - 32) * 0.98 - 1 <= max(starts) <= side - 32
    assert 100 < sum(p.flip for p in plans) < 300
    assert drawn((96, 64), 1, center_crop=True)[0].crop_top_left == (8, 0)


def test_given_sizes_are_those_of_the_crops_each_the_one_that_diffusers_chooses():
    text = "1024,1024; 768,1360;1360,768;880,1168;1168,880;1248,832;832,1248"
    config = TrainConfig(aspect_ratio_buckets=text)
    assert (config.enable_bucket, config.resolution) == (True, 1024)
    rule, sizes, rng = crop_rule(config), parse_buckets_string(text), random.Random(0)
    for size_px in [(rng.randint(300, 4000), rng.randint(300, 4000)) for _ in range(200)] + [(1000, 1000)]:
        assert rule.plan(size_px, rng).target_size == sizes[find_nearest_bucket(*size_px, sizes)]


@pytest.mark.parametrize("text", ["1024", "1024,1024;", "1024x768", "1024,100", "0,8", "8,8;a,b"])
def test_sizes_that_are_none_are_refused(text):
    with pytest.raises(UserError, match="expected heights and widths in px, multiples of 8, such as"):
        TrainConfig(aspect_ratio_buckets=text)


def test_a_zoom_comes_closer_but_not_beyond_the_photos_own_pixels():
    plans = drawn((128, 128), zoom=1.5)
    sides = [side for plan in plans for side in plan.resized]
    assert min(sides) == 32 and max(sides) == 48 and 38 < sum(sides) / len(sides) < 42
    assert all(0 <= edge <= plan.resized[0] - 32 for plan in plans for edge in plan.crop_top_left)
    assert len({plan.crop_top_left for plan in plans}) > 50, "a square photo gives crops that differ"
    assert all(32 <= plan.resized[0] <= 40 for plan in drawn((40, 40), 50, zoom=4))
    assert drawn((20, 20), 1, zoom=2)[0].resized == (32, 32)


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("flip", [False, True])
def test_a_crop_is_what_resizing_everything_first_gives(name, flip):
    photo, plan = smooth((300, 200)), CropPlan((300, 200), (75, 50), (11, 4), (50, 40), flip)
    whole = photo.resize(tuple(reversed(resized_size((300, 200), (50, 50)))), FILTERS[name])
    whole = whole.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else whole
    assert_close(apply_crop(photo, plan, name), whole.crop((4, 11, 44, 61)))


def test_a_mask_of_another_scale_is_cut_at_the_same_place():
    photo, plan = smooth((300, 200)), CropRule(40).plan((300, 200), random.Random(1))
    cuts = [np.asarray(apply_crop(image, plan), dtype=int) for image in (photo, photo.resize((100, 150)))]
    assert np.abs(cuts[0] - cuts[1]).mean() < 4
