"""Which file is a photo's mask, and that its pixels are white on the subject."""

import numpy as np
import pytest
from PIL import Image

from dreambooth_moslora.photos.folder import find_photos
from dreambooth_moslora.photos.masks import open_mask
from dreambooth_moslora.photos.photo import open_rgb
from tests.helpers.odd_photos import picture, transparent

PROMPT = "a photo of sks toy"


def test_what_is_transparent_becomes_white_and_is_not_learnt(tmp_path):
    transparent(tmp_path / "a.png")
    (photo,) = find_photos(tmp_path, PROMPT, 64).photos
    assert open_rgb(photo).getpixel((4, 4)) == (255, 255, 255)
    mask = open_mask(photo)
    assert (mask.getpixel((4, 4)), mask.getpixel((60, 60))) == (0, 255)


def test_alpha_white_means_no_mask(tmp_path):
    transparent(tmp_path / "a.png")
    (photo,) = find_photos(tmp_path, PROMPT, 64, alpha="white").photos
    assert open_mask(photo) is None and "transparent: on white" in photo.reasons


@pytest.mark.parametrize("name, white", [("a.mask.png", 1), ("a.mask.tif", 255), ("a.mask.jpg", 130)])
def test_a_mask_may_be_of_any_format_and_dim(tmp_path, name, white):
    Image.new("RGB", (128, 96), "green").save(tmp_path / "a.jpg")
    mask = Image.new("L", (128, 96), 0)
    mask.paste(white, (0, 0, 64, 96))
    mask.save(tmp_path / name)
    (photo,) = find_photos(tmp_path, "x", 64).photos
    found = open_mask(photo)
    assert found.getpixel((9, 9)) > 250 and found.getpixel((120, 9)) < 5


def test_a_mask_beside_the_photo_is_used_and_one_of_another_shape_is_refused(tmp_path):
    for name in ("a", "b", "c"):
        picture().save(tmp_path / f"{name}.jpg")
    mask = Image.new("L", (128, 96), 0)
    mask.paste(255, (32, 24, 96, 72))
    mask.save(tmp_path / "a.mask.png")
    Image.new("L", (96, 96), 255).save(tmp_path / "b.mask.png")
    Image.new("L", (128, 96), 0).save(tmp_path / "c.mask.png")
    a, b, c = find_photos(tmp_path, PROMPT, 64).photos
    assert np.array_equal(np.asarray(open_mask(a)), np.asarray(mask))
    assert open_mask(b) is None and "mask not used: its shape" in b.reasons[0]
    assert open_mask(c) is None and "black everywhere" in c.reasons[0]
