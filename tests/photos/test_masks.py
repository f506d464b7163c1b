"""Masks: which file is a photo's, where those that are made are written, and the models that make
them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dreambooth_moslora.disk.paths import find_asset
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.photos import masks
from dreambooth_moslora.photos.folder import find_photos
from dreambooth_moslora.photos.photo_file import (
    add_saved_masks,
    get_saved_mask_path,
    open_image,
    open_mask,
    open_rgb,
    to_grey_mask,
)
from dreambooth_moslora.settings.train_config import TrainConfig
from tests.helpers.odd_photos import picture, transparent
from tests.helpers.tiny_encoders import save_tiny_clipseg
from toybox.learning.train_segmenter import iou

PROMPT = "a photo of sks toy"
SDXL = "stabilityai/stable-diffusion-xl-base-1.0"


def test_what_is_transparent_becomes_white_and_is_not_learnt(tmp_path):
    """With alpha white, there is no mask."""
    transparent(tmp_path / "a.png")
    (photo,) = find_photos(tmp_path, PROMPT, 64).photos
    assert open_rgb(photo).getpixel((4, 4)) == (255, 255, 255)
    mask = open_mask(photo)
    assert (mask.getpixel((4, 4)), mask.getpixel((60, 60))) == (0, 255)
    (photo,) = find_photos(tmp_path, PROMPT, 64, alpha="white").photos
    assert open_mask(photo) is None and "transparent: on white" in photo.reasons


def paint(folder: Path, *names: str, **size) -> Path:
    folder.mkdir(exist_ok=True)
    for name in names:
        picture(**size).save(folder / name)
    return folder


def grey(size=(128, 96), ground: int = 0, *boxes: tuple, white: int = 255) -> Image.Image:
    mask = Image.new("L", size, ground)
    for box in boxes:
        mask.paste(white, box)
    return mask


@pytest.mark.parametrize(
    "name, white", [("a.mask.png", 1), ("a.mask.tif", 255), ("a.mask.jpg", 130)]
)
def test_a_mask_may_be_of_any_format_and_dim(tmp_path, name, white):
    grey((128, 96), 0, (0, 0, 64, 96), white=white).save(paint(tmp_path, "a.jpg") / name)
    (photo,) = photos_in(tmp_path)
    found = open_mask(photo)
    assert found.getpixel((9, 9)) > 250 and found.getpixel((120, 9)) < 5


def test_a_mask_beside_the_photo_is_used_and_one_of_another_shape_is_refused(tmp_path):
    paint(tmp_path, "a.jpg", "b.jpg", "c.jpg")
    mask = grey((128, 96), 0, (32, 24, 96, 72))
    for name, one in (("a", mask), ("b", grey((96, 96), 255)), ("c", grey())):
        one.save(tmp_path / f"{name}.mask.png")
    a, b, c = photos_in(tmp_path)
    assert np.array_equal(np.asarray(open_mask(a)), np.asarray(mask))
    assert open_mask(b) is None and "mask not used: its shape" in b.reasons[0]
    assert open_mask(c) is None and "black everywhere" in c.reasons[0]


def half(word: str = "dog") -> masks.Segmenter:
    """Finds the left half of everything, and counts."""

    def probabilities(image: Image.Image) -> torch.Tensor:
        segmenter.asked.append(image.size)
        found = torch.zeros(image.height, image.width)
        found[:, : image.width // 2] = 0.9 if word != "nothing" else 0.0
        return found

    segmenter = masks.Segmenter("half", word, probabilities)
    object.__setattr__(segmenter, "asked", [])
    return segmenter


def photos_in(folder: Path):
    return find_photos(folder, "x", 64).photos


def test_masks_go_beside_photos_that_have_none_and_a_persons_own_stay(tmp_path):
    """Photos that would share one get none; one that is turned by EXIF gets an upright one."""
    paint(tmp_path, "a.jpg", "b.jpg", "c.jpg", "e.jpg", "e.png")
    transparent(tmp_path / "d.png")
    grey(ground=255).save(tmp_path / "b.mask.png")
    grey((96, 96), 255).save(tmp_path / "c.mask.png")  # of no use
    exif = Image.Exif()
    exif[0x0112] = 6
    picture().save(tmp_path / "f.jpg", exif=exif)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    made = list(masks.write_mask_files(photos_in(tmp_path), half()))
    assert [mask.path and mask.path.name for mask in made] == [
        "a.mask.png",
        *[None] * 5,
        "f.mask.png",
    ]
    assert ["kept" in mask.remark for mask in made] == [
        False,
        True,
        True,
        True,
        False,
        False,
        False,
    ]
    assert [mask.remark for mask in made[4:6]] == [
        "another photo has the name e too: rename one of them"
    ] * 2
    assert all(path.read_bytes() == content for path, content in before.items())
    first, *_, turned = photos_in(tmp_path)
    mask = np.asarray(open_mask(first))
    assert mask.shape == (96, 128) and (mask[:, :64] == 255).all() and (mask[:, 64:] == 0).all()
    assert turned.size_px == (128, 96) and open_mask(turned).size == (96, 128)


def test_kept_masks_are_made_once_for_each_photo_model_and_word(tmp_path):
    folder, kept = paint(tmp_path / "photos", "a.jpg", "a.png"), tmp_path / "masks"

    def asked(segmenter: masks.Segmenter) -> int:
        for photo in photos_in(folder):
            masks.make_run_mask(photo, segmenter, kept)
        return len(segmenter.asked)

    assert [asked(half()), asked(half()), asked(half("cat"))] == [2, 0, 2]
    first = get_saved_mask_path(photos_in(folder)[0], kept).read_bytes()
    paint(folder, "a.jpg", size_px=(64, 64))
    assert asked(half("cat")) == 1
    photos = photos_in(folder)
    assert get_saved_mask_path(photos[0], kept).read_bytes() != first
    found = add_saved_masks(photos, kept)
    assert [photo.mask_path.name for photo in found] == ["a.jpg.mask.png", "a.png.mask.png"]
    assert sorted(path.name for path in folder.iterdir()) == ["a.jpg", "a.png"]


def test_a_subject_that_is_not_found_gets_no_mask_and_loses_that_of_another_word(tmp_path):
    """A kept mask of another shape is not used either."""
    photos, kept = photos_in(paint(tmp_path, "a.jpg")), tmp_path / "masks"
    masks.make_run_mask(photos[0], half(), kept)
    made = masks.make_run_mask(photos[0], half("nothing"), kept)
    assert made.path is None and "“nothing” was not found" in made.remark
    assert add_saved_masks(photos, kept) == photos
    grey((10, 90), 255).save(get_saved_mask_path(photos[0], kept))
    assert add_saved_masks(photos, kept) == photos


LOOKS = [
    ([(40, 40, 200, 150)], ""),
    ([(100, 100, 110, 110)], "nearly empty: 0.2% of the photo"),
    ([(0, 0, 256, 190)], "nearly the whole picture: 99%"),
]


@pytest.mark.parametrize(("boxes", "says"), LOOKS)
def test_what_looks_wrong_is_said(boxes, says):
    warning = masks.describe_mask_quality(grey((256, 192), 0, *boxes))
    assert warning.startswith(says) and bool(warning) == bool(says)


@pytest.fixture(scope="module")
def clipseg(tmp_path_factory) -> str:
    return str(save_tiny_clipseg(tmp_path_factory.mktemp("clipseg")))


def config_of(**settings) -> TrainConfig:
    return TrainConfig(
        **{
            "pretrained_model_name_or_path": SDXL,
            "instance_prompt": "a photo of sks dog",
            **settings,
        }
    )


def test_clipseg_is_asked_for_the_class_word_or_for_the_prompt(clipseg):
    image, settings = picture(), ({"mask_prompt": "dog"}, {"mask_prompt": "cat"}, {})
    seen = [
        masks.load_segmenter(config_of(mask_model=clipseg, **one)).probabilities(image)
        for one in settings
    ]
    assert all(
        found.shape == (image.height, image.width) and found.dtype == torch.float32
        for found in seen
    )
    assert torch.equal(seen[2], seen[0]) and not torch.equal(seen[2], seen[1])


@pytest.mark.parametrize(("peak", "share"), [(0.1, 0.0), (0.3, 0.5), (0.99, 0.5)])
def test_a_mask_begins_at_half_of_the_highest_probability_and_is_black_without_a_peak(peak, share):
    found = torch.full((8, 16), 0.4 * peak)
    found[:, :8] = peak
    mask = np.asarray(
        masks.Segmenter("x", "dog", lambda image: found).mask(Image.new("RGB", (16, 8)))
    )
    assert (
        mask.shape == (8, 16) and (mask > 127).mean() == share and set(np.unique(mask)) <= {0, 255}
    )


def test_an_absent_model_and_a_foreign_one_are_one_line(clipseg, tmp_path):
    """So is no word to look for; the toy net needs none."""
    (tmp_path / "config.json").write_text("{}")
    for settings, said in (
        ({}, "CIDAS/clipseg-rd64-refined is not here and cannot be fetched"),
        ({"mask_model": str(tmp_path)}, "--mask_model"),
        ({"mask_model": clipseg, "instance_prompt": "sks"}, "--mask_prompt"),
    ):
        with pytest.raises(UserError, match=said):
            masks.load_segmenter(config_of(**settings)).mask(picture())
    assert (
        masks.get_mask_word(config_of(pretrained_model_name_or_path="toy", instance_prompt="sks"))
        == ""
    )
    assert (
        masks.get_mask_word(
            config_of(pretrained_model_name_or_path="toy", mask_model=masks.DEFAULT_MASK_MODEL)
        )
        == "dog"
    )


def test_the_toy_net_finds_the_sample_subjects():
    """None of them is in its training; eight photos of 512 px against their true masks."""
    segmenter = masks.load_segmenter(config_of(pretrained_model_name_or_path="toy"))
    found, true = [], []
    for path in sorted(Path(find_asset("assets/subjects")).glob("*/00.jpg")):
        found.append(np.asarray(segmenter.mask(open_image(path))))
        true.append(np.asarray(to_grey_mask(open_image(path.with_name("00.mask.png")))))
    scores = iou(*(torch.from_numpy(np.stack(masks)) > 127 for masks in (found, true)))
    assert len(scores) == 8 and scores.mean() > 0.88 and scores.min() > 0.7
