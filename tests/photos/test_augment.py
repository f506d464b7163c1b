"""Augmentations: a row of the table is all that training, previews and the cache need to know."""

import random

import numpy as np
import pytest
from PIL import Image

from dreambooth_moslora.photos import augment
from dreambooth_moslora.photos.cropping import CropRule, apply_crop
from dreambooth_moslora.settings import table

FLIPPED = ((augment.MIRROR, True),)


@pytest.mark.parametrize("name", augment.AUGMENTATIONS)
def test_each_row_is_a_setting_that_check_takes_and_whose_help_says_that_kept_crops_stay(name):
    facts = table.SETTINGS[name].metadata
    assert facts["check"] and facts["help"].endswith(table.CHANGED_ONCE)


@pytest.mark.parametrize("name", augment.AUGMENTATIONS)
@pytest.mark.parametrize("drawn", [0.0, 0.999])
def test_each_row_keeps_the_size_and_mode_of_a_crop(name, drawn):
    kind, crop = augment.AUGMENTATIONS[name], Image.effect_noise((48, 32), 90).convert("RGB")
    value = table.SETTINGS[name].metadata["high"] or True
    parameter = kind.pick(drawn, value)
    if parameter is None:
        return
    for before in [crop, crop.getchannel(0)] if kind.moves_pixels else [crop]:
        after = kind.change(before, parameter)
        assert (after.size, after.mode) == (before.size, before.mode)


@pytest.fixture
def darkened(monkeypatch):
    """A second row: three quarters of the crops are darker by up to the setting's share."""
    kind = augment.Augmentation(
        pick=lambda drawn, most: most * drawn if drawn > 0.25 else None,
        change=lambda crop, share: crop.point(lambda value: round(value * (1 - share))),
    )
    monkeypatch.setitem(augment.AUGMENTATIONS, "darkening", kind)


def plans_of(asked):
    rule = CropRule(32, augmentations=asked)
    return [rule.plan((80, 60), random.Random(seed)) for seed in range(40)]


def test_a_new_row_moves_no_draw_of_the_others_and_changes_the_picture_and_not_its_mask(darkened):
    photo = Image.effect_noise((60, 80), 90).convert("RGB")
    mask = photo.getchannel(0)
    both = plans_of((*FLIPPED, ("darkening", 0.8)))
    darker = 0
    for one, plan in zip(plans_of(FLIPPED), both, strict=True):
        # The place, the mirroring and the mask are those of a run without it.
        assert plan.time_ids == one.time_ids
        assert plan.changes[: len(one.changes)] == one.changes
        cuts = [apply_crop(mask, each, is_mask=True) for each in (one, plan)]
        assert np.array_equal(*map(np.asarray, cuts))

        # The picture is darker, and its plan another; one that it leaves alone keeps its key.
        share = dict(plan.changes).get("darkening")
        before = np.asarray(apply_crop(photo, one), dtype=float)
        after = np.asarray(apply_crop(photo, plan), dtype=float)
        assert (str(plan) == str(one)) == (share is None)
        assert np.abs(after - before * (1 - (share or 0.0))).max() <= 0.5
        darker += share is not None
    assert 20 < darker < 38
