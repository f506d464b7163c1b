"""Masks: which file is a photo's, where those that are made are written, and the models that make them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dreambooth_moslora.core import UserError, find_asset
from dreambooth_moslora.photos.folder import find_photos
from dreambooth_moslora.photos.masks import (
    CLIPSEG,
    Segmenter,
    grey_mask,
    kept_path,
    load_segmenter,
    make_beside,
    make_kept,
    open_mask,
    quality_warning,
    sought_word,
    with_kept_masks,
)
from dreambooth_moslora.photos.photo import open_image, open_rgb
from dreambooth_moslora.settings.table import TrainConfig
from tests.helpers.odd_photos import picture, transparent
from tests.helpers.tiny_clipseg import save_tiny_clipseg
from toybox.learning.train_segmenter import iou

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


SDXL = "stabilityai/stable-diffusion-xl-base-1.0"


@pytest.fixture(scope="module")
def clipseg(tmp_path_factory) -> str:
    return str(save_tiny_clipseg(tmp_path_factory.mktemp("clipseg")))


def config_of(**settings) -> TrainConfig:
    return TrainConfig(**{"pretrained_model_name_or_path": SDXL, "instance_prompt": "a photo of sks dog", **settings})


def test_clipseg_is_asked_for_the_class_word_or_for_the_prompt(clipseg):
    image = picture()
    seen = {}
    for word in ("dog", "cat"):
        found = load_segmenter(config_of(mask_model=clipseg, mask_prompt=word)).probabilities(image)
        assert found.shape == (image.height, image.width) and found.dtype == torch.float32
        seen[word] = found
    dog = load_segmenter(config_of(mask_model=clipseg)).probabilities(image)
    assert torch.equal(dog, seen["dog"]) and not torch.equal(dog, seen["cat"])


@pytest.mark.parametrize(("peak", "share"), [(0.1, 0.0), (0.3, 0.5), (0.99, 0.5)])
def test_a_mask_begins_at_half_of_the_highest_probability_and_is_black_without_a_peak(peak, share):
    found = torch.full((8, 16), 0.4 * peak)
    found[:, :8] = peak
    mask = np.asarray(Segmenter("x", "dog", lambda image: found).mask(Image.new("RGB", (16, 8))))
    assert mask.shape == (8, 16) and (mask > 127).mean() == share and set(np.unique(mask)) <= {0, 255}


def test_an_absent_model_and_a_foreign_one_are_one_line(clipseg, tmp_path):
    with pytest.raises(UserError, match="CIDAS/clipseg-rd64-refined is not here and cannot be fetched"):
        load_segmenter(config_of()).mask(picture())
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="--mask_model"):
        load_segmenter(config_of(mask_model=str(tmp_path))).mask(picture())


def test_without_a_word_clipseg_has_nothing_to_look_for_and_the_toy_net_needs_none():
    with pytest.raises(UserError, match="--mask_prompt"):
        sought_word(config_of(instance_prompt="sks"))
    assert sought_word(config_of(pretrained_model_name_or_path="toy", instance_prompt="sks")) == ""
    assert sought_word(config_of(pretrained_model_name_or_path="toy", mask_model=CLIPSEG)) == "dog"


def test_the_toy_net_finds_the_sample_subjects():
    """None of them is in its training; eight photos of 512 px against their true masks."""
    segmenter = load_segmenter(config_of(pretrained_model_name_or_path="toy"))
    found, true = [], []
    for path in sorted(Path(find_asset("assets/subjects")).glob("*/00.jpg")):
        found.append(np.asarray(segmenter.mask(open_image(path))))
        true.append(np.asarray(grey_mask(open_image(path.with_name("00.mask.png")))))
    scores = iou(*(torch.from_numpy(np.stack(masks)) > 127 for masks in (found, true)))
    assert len(scores) == 8 and scores.mean() > 0.88 and scores.min() > 0.7
