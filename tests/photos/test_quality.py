"""Faults of photos: blur, near-duplicates, equal backgrounds; and where they are reported."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from dreambooth_moslora.cli.command_check import format_report
from dreambooth_moslora.photos.folder import find_photos
from dreambooth_moslora.photos.quality import (
    FAULTS,
    MIN_SHARPNESS,
    find_photo_faults,
    list_faults,
    measure_sharpness,
)
from dreambooth_moslora.training import loop
from tests.helpers.tiny_training import tiny_config

PROMPT = "a photo of sks toy"
SUBJECTS = sorted((Path(__file__).parents[2] / "assets" / "subjects").iterdir())


def paint_scene(seed: int, light: float = 1.0) -> Image.Image:
    tiles = np.random.default_rng(seed).integers(40, 255, (6, 6, 3))
    tiles = (tiles * light).clip(0, 255).astype(np.uint8)
    return Image.fromarray(tiles).resize((300, 300), Image.Resampling.NEAREST)


def test_blurred_small_and_duplicate_photos_have_a_fault(tmp_path):
    photos = {"a": paint_scene(1), "b": paint_scene(1).crop((4, 4, 296, 298)), "c": paint_scene(2)}
    photos |= {"d": paint_scene(3).filter(ImageFilter.GaussianBlur(5))}
    photos |= {"0-small": photos["a"].resize((50, 50)), "1-smaller": photos["a"].resize((80, 80))}
    for name, photo in photos.items():
        photo.save(tmp_path / f"{name}.png")
    report = find_photo_faults(find_photos(tmp_path, PROMPT, 80))
    verdicts = {p.path.stem: "; ".join(p.reasons) for p in report.photos}
    assert verdicts["a"] == verdicts["c"] == "" and verdicts["b"] == "near-duplicate of a.png"
    assert verdicts["0-small"].startswith("too small") and verdicts["0-small"].endswith(
        "; near-duplicate of a.png"
    )
    assert verdicts["1-smaller"] == "near-duplicate of a.png", (
        "the largest is kept, though it is not the first"
    )
    assert verdicts["d"].startswith("blurred")

    # Each is a row of the table, by which `check` marks the photo; every row is among them.
    faults = {reason.fault for photo in report.photos for reason in list_faults(photo)}
    assert faults == FAULTS.keys()
    bad = {photo.path.stem for photo in report.photos if list_faults(photo)}
    assert bad == {stem for stem, reason in verdicts.items() if reason}
    assert format_report(report, "for toy").count("  bad   ") == len(bad)


def test_a_mild_reason_is_no_fault_whatever_its_words(tmp_path):
    """Turning a photo upright is none, also where a fault of the table has such a name."""
    turned = Image.Exif()
    turned[0x0112] = 6
    paint_scene(1).save(tmp_path / "a.png", exif=turned)
    (photo,) = find_photo_faults(find_photos(tmp_path, PROMPT, 64)).photos
    assert photo.reasons == ("rotated by EXIF: turned upright",) and list_faults(photo) == []
    reasons = replace(photo, reasons=("blurred edges were cut off",))
    assert list_faults(reasons) == []


@pytest.mark.parametrize(
    ("side_px", "reasons"), [(60, ("small subject: 20% of the frame",)), (90, ())]
)
def test_a_subject_with_a_small_mask_is_remarked(side_px, reasons, tmp_path):
    paint_scene(1).save(tmp_path / "a.png")
    mask = Image.new("L", (300, 300))
    mask.paste(255, (10, 10, 40, 10 + side_px))
    mask.save(tmp_path / "a.mask.png")
    (photo,) = find_photo_faults(find_photos(tmp_path, PROMPT, 64)).photos
    assert photo.reasons == reasons and not list_faults(photo)


def test_the_white_behind_a_cut_out_is_not_its_likeness(tmp_path):
    """Nine tenths of each are transparent, and the subject is in the same place."""
    for name, photo in {
        "a": paint_scene(1),
        "b": paint_scene(1, 0.8),
        "c": paint_scene(2),
    }.items():
        cut_out = Image.new("RGBA", (300, 300))
        cut_out.paste(photo.resize((100, 100)), (100, 100))
        cut_out.save(tmp_path / f"{name}.png")
    verdicts = {
        p.path.stem: p.reasons[1:]
        for p in find_photo_faults(find_photos(tmp_path, PROMPT, 64)).photos
    }
    assert verdicts == {"a": (), "b": ("near-duplicate of a.png",), "c": ()}


def paint_before_wall(head: int, place: int = 0) -> Image.Image:
    """A figure before a wall that is darker on one side; `head` and `place` of it change."""
    wall = np.linspace((90, 80, 70), (200, 190, 180), 300, dtype=np.uint8)
    photo = Image.fromarray(np.tile(wall, (300, 1, 1)))
    photo.paste(paint_scene(7).resize((100, 120)), (100 + place, 140))
    photo.paste(paint_scene(head).resize((80, 70)), (110 + place, 70))
    return photo


def test_one_background_of_most_photos_is_remarked(tmp_path):
    for number in range(4):
        paint_before_wall(head=number, place=4 * number).save(tmp_path / f"{number}.png")
    paint_scene(9).save(tmp_path / "4.png")
    report = find_photo_faults(find_photos(tmp_path, PROMPT, 64))
    assert [photo.reasons for photo in report.photos] == [()] * 5
    (reasons,) = report.remarks
    assert reasons.startswith("4 of 5 have the same background")

    # A mask says what is background, and a part of the photos may share one.
    for number in range(4):
        Image.new("L", (300, 300), 255).save(tmp_path / f"{number}.mask.png")
    assert find_photo_faults(find_photos(tmp_path, PROMPT, 64)).remarks == ()
    for file in tmp_path.glob("[23]*"):
        file.unlink()
    assert find_photo_faults(find_photos(tmp_path, PROMPT, 64)).remarks == ()


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda path: path.name)
def test_the_sample_subjects_stand_in_different_places(subject):
    report = find_photo_faults(find_photos(subject, PROMPT, 128), 128)
    assert report.remarks == () and not any(map(list_faults, report.photos))


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda path: path.name)
def test_a_soft_large_photo_is_sharp_enough_for_a_small_training(subject):
    for path in sorted(subject.glob("*.jpg")):
        image = Image.open(path).convert("RGB")
        assert measure_sharpness(image, 512) < MIN_SHARPNESS < measure_sharpness(image, 128)
        assert measure_sharpness(image.filter(ImageFilter.GaussianBlur(6)), 128) < MIN_SHARPNESS


@pytest.mark.slow
def test_a_training_says_once_what_is_wrong_with_its_photos(tiny_base, tmp_path, caplog):
    """Of each photo, and of the whole set; a run that goes on does not say it again."""
    photos = tmp_path / "photos"
    photos.mkdir()
    paint_scene(1).save(photos / "a.png")
    shutil.copy(photos / "a.png", photos / "b.png")
    small = {"max_train_steps": 1, "learning_rate": 1e-3}
    loop.train(tiny_config(tiny_base, photos, tmp_path / "run", **small))
    line = "the photos: too few: take 3 or more; of a thing the command “enlarge” makes them "
    line += "from one; b.png (near-duplicate of a.png)"
    assert [text for text in caplog.messages if text.startswith("the photos: ")] == [line]
    again = small | {"max_train_steps": 2, "resume_from_checkpoint": "latest"}
    loop.train(tiny_config(tiny_base, photos, tmp_path / "run", **again))
    assert caplog.text.count("the photos: ") == 1
