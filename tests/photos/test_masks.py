"""Masks: the file of a photo, where generated ones are written, and the models that make them."""

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


def build_mask(size=(128, 96), ground: int = 0, *boxes: tuple, white: int = 255) -> Image.Image:
    mask = Image.new("L", size, ground)
    for box in boxes:
        mask.paste(white, box)
    return mask


@pytest.mark.parametrize(
    "name, white", [("a.mask.png", 1), ("a.mask.tif", 255), ("a.mask.jpg", 130)]
)
def test_a_mask_may_be_of_any_format_and_dim(tmp_path, name, white):
    build_mask((128, 96), 0, (0, 0, 64, 96), white=white).save(paint(tmp_path, "a.jpg") / name)
    (photo,) = list_photos(tmp_path)
    probabilities = open_mask(photo)
    assert probabilities.getpixel((9, 9)) > 250 and probabilities.getpixel((120, 9)) < 5


def test_a_mask_of_another_shape_or_all_black_is_not_used(tmp_path):
    paint(tmp_path, "a.jpg", "b.jpg", "c.jpg")
    mask = build_mask((128, 96), 0, (32, 24, 96, 72))
    for name, settings in (("a", mask), ("b", build_mask((96, 96), 255)), ("c", build_mask())):
        settings.save(tmp_path / f"{name}.mask.png")
    a, b, c = list_photos(tmp_path)
    assert np.array_equal(np.asarray(open_mask(a)), np.asarray(mask))
    assert open_mask(b) is None and "mask not used: its shape" in b.reasons[0]
    assert open_mask(c) is None and "black everywhere" in c.reasons[0]


def build_half_segmenter(word: str = "dog") -> masks.Segmenter:
    """Return a segmenter that finds the left half of every photo and records its calls."""

    def probabilities(image: Image.Image) -> torch.Tensor:
        segmenter.asked.append(image.size)
        probabilities = torch.zeros(image.height, image.width)
        probabilities[:, : image.width // 2] = 0.9 if word != "nothing" else 0.0
        return probabilities

    segmenter = masks.Segmenter("half", word, probabilities)
    object.__setattr__(segmenter, "asked", [])
    return segmenter


def list_photos(folder: Path):
    return find_photos(folder, "x", 64).photos


def test_only_photos_without_a_mask_get_one_beside_them(tmp_path):
    """Photos that would share one get none; one that is turned by EXIF gets an upright one."""
    paint(tmp_path, "a.jpg", "b.jpg", "c.jpg", "e.jpg", "e.png")
    transparent(tmp_path / "d.png")
    build_mask(ground=255).save(tmp_path / "b.mask.png")
    build_mask((96, 96), 255).save(tmp_path / "c.mask.png")  # of no use
    exif = Image.Exif()
    exif[0x0112] = 6
    picture().save(tmp_path / "f.jpg", exif=exif)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    generated = list(masks.write_mask_files(list_photos(tmp_path), build_half_segmenter()))
    assert [mask.path and mask.path.name for mask in generated] == [
        "a.mask.png",
        *[None] * 5,
        "f.mask.png",
    ]
    assert ["kept" in mask.remark for mask in generated] == [
        False,
        True,
        True,
        True,
        False,
        False,
        False,
    ]
    assert [mask.remark for mask in generated[4:6]] == [
        "another photo has the name e too: rename one of them"
    ] * 2
    assert all(path.read_bytes() == content for path, content in before.items())
    first, *_, turned = list_photos(tmp_path)
    mask = np.asarray(open_mask(first))
    assert mask.shape == (96, 128) and (mask[:, :64] == 255).all() and (mask[:, 64:] == 0).all()
    assert turned.size_px == (128, 96) and open_mask(turned).size == (96, 128)


def test_a_saved_mask_is_used_again_for_photo_model_and_word(tmp_path):
    folder, masks_folder = paint(tmp_path / "photos", "a.jpg", "a.png"), tmp_path / "masks"

    def count_calls(segmenter: masks.Segmenter) -> int:
        for photo in list_photos(folder):
            masks.make_run_mask(photo, segmenter, masks_folder)
        return len(segmenter.asked)

    assert [
        count_calls(build_half_segmenter()),
        count_calls(build_half_segmenter()),
        count_calls(build_half_segmenter("cat")),
    ] == [2, 0, 2]
    first = get_saved_mask_path(list_photos(folder)[0], masks_folder).read_bytes()
    paint(folder, "a.jpg", size_px=(64, 64))
    assert count_calls(build_half_segmenter("cat")) == 1
    photos = list_photos(folder)
    assert get_saved_mask_path(photos[0], masks_folder).read_bytes() != first
    probabilities = add_saved_masks(photos, masks_folder)
    assert [photo.mask_path.name for photo in probabilities] == ["a.jpg.mask.png", "a.png.mask.png"]
    assert sorted(path.name for path in folder.iterdir()) == ["a.jpg", "a.png"]


def test_an_absent_subject_has_no_mask_and_loses_a_saved_one(tmp_path):
    """A kept mask of another shape is not used either."""
    photos, masks_folder = list_photos(paint(tmp_path, "a.jpg")), tmp_path / "masks"
    masks.make_run_mask(photos[0], build_half_segmenter(), masks_folder)
    generated = masks.make_run_mask(photos[0], build_half_segmenter("nothing"), masks_folder)
    assert generated.path is None and "“nothing” was not found" in generated.remark
    assert add_saved_masks(photos, masks_folder) == photos
    build_mask((10, 90), 255).save(get_saved_mask_path(photos[0], masks_folder))
    assert add_saved_masks(photos, masks_folder) == photos


LOOKS = [
    ([(40, 40, 200, 150)], ""),
    ([(100, 100, 110, 110)], "nearly empty: 0.2% of the photo"),
    ([(0, 0, 256, 190)], "nearly the whole picture: 99%"),
]


@pytest.mark.parametrize(("boxes", "remark"), LOOKS)
def test_an_implausible_mask_is_remarked(boxes, remark):
    warning = masks.describe_mask_quality(build_mask((256, 192), 0, *boxes))
    assert warning.startswith(remark) and bool(warning) == bool(remark)


@pytest.fixture(scope="module")
def clipseg(tmp_path_factory) -> str:
    return str(save_tiny_clipseg(tmp_path_factory.mktemp("clipseg")))


def build_config(**settings) -> TrainConfig:
    return TrainConfig(
        **{
            "pretrained_model_name_or_path": SDXL,
            "instance_prompt": "a photo of sks dog",
            **settings,
        }
    )


def test_clipseg_looks_for_the_class_word_or_the_mask_prompt(clipseg):
    image, settings = picture(), ({"mask_prompt": "dog"}, {"mask_prompt": "cat"}, {})
    results = [
        masks.load_segmenter(build_config(mask_model=clipseg, **settings)).probabilities(image)
        for settings in settings
    ]
    assert all(
        probabilities.shape == (image.height, image.width) and probabilities.dtype == torch.float32
        for probabilities in results
    )
    assert torch.equal(results[2], results[0]) and not torch.equal(results[2], results[1])


@pytest.mark.parametrize(("peak", "share"), [(0.1, 0.0), (0.3, 0.5), (0.99, 0.5)])
def test_a_mask_begins_at_half_of_the_peak_and_needs_one(peak, share):
    probabilities = torch.full((8, 16), 0.4 * peak)
    probabilities[:, :8] = peak
    mask = np.asarray(
        masks.Segmenter("x", "dog", lambda image: probabilities).mask(Image.new("RGB", (16, 8)))
    )
    assert (
        mask.shape == (8, 16) and (mask > 127).mean() == share and set(np.unique(mask)) <= {0, 255}
    )


def test_an_unusable_mask_model_is_refused_in_one_line(clipseg, tmp_path):
    """So is no word to look for; the toy net needs none."""
    (tmp_path / "config.json").write_text("{}")
    for settings, message in (
        ({}, "CIDAS/clipseg-rd64-refined is not here and cannot be fetched"),
        ({"mask_model": str(tmp_path)}, "--mask_model"),
        ({"mask_model": clipseg, "instance_prompt": "sks"}, "--mask_prompt"),
    ):
        with pytest.raises(UserError, match=message):
            masks.load_segmenter(build_config(**settings)).mask(picture())
    assert (
        masks.get_mask_word(
            build_config(pretrained_model_name_or_path="toy", instance_prompt="sks")
        )
        == ""
    )
    assert (
        masks.get_mask_word(
            build_config(pretrained_model_name_or_path="toy", mask_model=masks.DEFAULT_MASK_MODEL)
        )
        == "dog"
    )


def test_the_toy_net_finds_the_sample_subjects():
    """None of them is in its training; eight photos of 512 px against their true masks."""
    segmenter = masks.load_segmenter(build_config(pretrained_model_name_or_path="toy"))
    probabilities, true = [], []
    for path in sorted(Path(find_asset("assets/subjects")).glob("*/00.jpg")):
        probabilities.append(np.asarray(segmenter.mask(open_image(path))))
        true.append(np.asarray(to_grey_mask(open_image(path.with_name("00.mask.png")))))
    scores = iou(*(torch.from_numpy(np.stack(masks)) > 127 for masks in (probabilities, true)))
    assert len(scores) == 8 and scores.mean() > 0.88 and scores.min() > 0.7
