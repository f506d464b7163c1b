"""Masks made for photos: where they are written, what is never touched, and what is said of them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dreambooth_moslora.photos.folder import find_photos
from dreambooth_moslora.photos.mask_making import Segmenter, make_beside, make_kept, quality_warning
from dreambooth_moslora.photos.masks import kept_path, open_mask, with_kept_masks
from tests.helpers.odd_photos import picture, transparent


def half(word: str = "dog") -> Segmenter:
    """Finds the left half of everything, and counts."""
    asked = []

    def probabilities(image: Image.Image) -> torch.Tensor:
        asked.append(image.size)
        found = torch.zeros(image.height, image.width)
        found[:, : image.width // 2] = 0.9 if word != "nothing" else 0.0
        return found

    segmenter = Segmenter("half", word, probabilities)
    object.__setattr__(segmenter, "asked", asked)
    return segmenter


def photos_in(folder: Path):
    return find_photos(folder, "x", 64).photos


def test_masks_go_beside_photos_that_have_none_and_a_persons_own_stay(tmp_path):
    for name in ("a", "b", "c"):
        picture().save(tmp_path / f"{name}.jpg")
    transparent(tmp_path / "d.png")
    own = Image.new("L", (128, 96), 255)
    own.save(tmp_path / "b.mask.png")
    Image.new("L", (96, 96), 255).save(tmp_path / "c.mask.png")  # of no use
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    made = list(make_beside(photos_in(tmp_path), half()))
    assert [mask.path and mask.path.name for mask in made] == ["a.mask.png", None, None, None]
    assert ["kept" in mask.remark for mask in made] == [False, True, True, True]
    assert all(path.read_bytes() == content for path, content in before.items())
    a = photos_in(tmp_path)[0]
    mask = np.asarray(open_mask(a))
    assert mask.shape == (96, 128) and (mask[:, :64] == 255).all() and (mask[:, 64:] == 0).all()


def test_photos_that_would_share_a_mask_get_none(tmp_path):
    for name in ("a.jpg", "a.png", "b.jpg"):
        picture().save(tmp_path / name)
    made = list(make_beside(photos_in(tmp_path), half()))
    assert [mask.path and mask.path.name for mask in made] == [None, None, "b.mask.png"]
    assert [mask.remark for mask in made[:2]] == ["another photo has the name a too: rename one of them"] * 2


def test_a_photo_that_is_turned_by_exif_gets_an_upright_mask(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture().save(tmp_path / "a.jpg", exif=exif)
    list(make_beside(photos_in(tmp_path), half()))
    (photo,) = photos_in(tmp_path)
    assert photo.size_px == (128, 96) and open_mask(photo).size == (96, 128)


def test_kept_masks_are_made_once_for_each_photo_model_and_word(tmp_path):
    folder, kept = tmp_path / "photos", tmp_path / "masks"
    folder.mkdir()
    picture().save(folder / "a.jpg")
    picture().save(folder / "a.png")
    photos = photos_in(folder)

    def asked(segmenter: Segmenter) -> int:
        for photo in photos:
            make_kept(photo, segmenter, kept)
        return len(segmenter.asked)

    assert [asked(half()), asked(half()), asked(half("cat"))] == [2, 0, 2]
    first = kept_path(photos[0], kept).read_bytes()
    picture(size_px=(64, 64)).save(folder / "a.jpg")
    photos = photos_in(folder)
    assert asked(half("cat")) == 1
    assert kept_path(photos[0], kept).read_bytes() != first
    found = with_kept_masks(photos, kept)
    assert [photo.mask_path.name for photo in found] == ["a.jpg.mask.png", "a.png.mask.png"]
    assert sorted(path.name for path in folder.iterdir()) == ["a.jpg", "a.png"]


def test_a_subject_that_is_not_found_gets_no_mask_and_loses_that_of_another_word(tmp_path):
    picture().save(tmp_path / "a.jpg")
    photos = photos_in(tmp_path)
    make_kept(photos[0], half(), tmp_path / "masks")
    made = make_kept(photos[0], half("nothing"), tmp_path / "masks")
    assert made.path is None and "“nothing” was not found" in made.remark
    assert with_kept_masks(photos, tmp_path / "masks") == photos


def test_a_kept_mask_of_another_shape_is_not_used(tmp_path):
    picture().save(tmp_path / "a.jpg")
    photos = photos_in(tmp_path)
    Image.new("L", (10, 90), 255).save(kept_path(photos[0], tmp_path))
    assert with_kept_masks(photos, tmp_path) == photos


def mask_of(*boxes: tuple[int, int, int, int]) -> Image.Image:
    mask = Image.new("L", (256, 192))
    for box in boxes:
        mask.paste(255, box)
    return mask


@pytest.mark.parametrize(
    ("mask", "says"),
    [
        (mask_of((40, 40, 200, 150)), ""),
        (mask_of((40, 40, 200, 150), (2, 2, 5, 5)), ""),
        (mask_of((40, 40, 80, 150), (120, 40, 200, 150)), ""),
        (mask_of((100, 100, 110, 110)), "nearly empty: 0.2% of the photo"),
        (mask_of((0, 0, 256, 190)), "nearly the whole picture: 99%"),
        (mask_of(*((x, 20, x + 30, 60) for x in (10, 60, 110, 160))), "in 4 pieces"),
    ],
)
def test_what_looks_wrong_is_said(mask, says):
    warning = quality_warning(mask)
    assert warning.startswith(says) and bool(warning) == bool(says)
