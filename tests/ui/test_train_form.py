"""The page's training form: the config that it makes, the photos and captions that it takes."""

import random
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import PIL.Image
import PIL.ImageFilter
import pytest

from dreambooth_moslora.core.config import TrainConfig
from dreambooth_moslora.core.config_files import load_settings
from dreambooth_moslora.core.errors import UserError
from dreambooth_moslora.photos.crop_preview import plans_of
from dreambooth_moslora.photos.crops import apply_crop, plan_crop
from dreambooth_moslora.photos.folder import find_photos
from dreambooth_moslora.photos.photo import open_rgb
from dreambooth_moslora.ui.generate_form import GenerateForm
from dreambooth_moslora.ui.photo_uploads import take_photos
from dreambooth_moslora.ui.train_actions import (
    review_photos,
)
from dreambooth_moslora.ui.train_form import QUICK_START, TrainForm, prompts_of
from tests.ui.test_handlers import visitor


def test_the_training_form_makes_a_config_the_trainer_accepts(tmp_path):
    form = TrainForm("sks", "dog", prior_preservation=True, captions="one\n\nthree")
    config = TrainConfig.from_dict(form.config("toy", 128, tmp_path / "photos", tmp_path / "run"))
    assert (config.instance_prompt, config.class_prompt) == ("a photo of a sks dog", "a photo of a dog")
    assert config.with_prior_preservation and config.resolution == 128 and config.max_train_steps == 300
    quick = load_settings(QUICK_START)
    assert config.target_modules == tuple(quick["target_modules"]) and config.rank == quick["rank"]
    assert config.prior_prompts == tuple(quick["prior_prompts"]) and config.learning_rate == quick["learning_rate"]
    plain = replace(form, prior_preservation=False).config("toy", 128, tmp_path / "photos", tmp_path / "run")
    assert not any(name.startswith("prior") for name in plain) and plain["target_modules"] == quick["target_modules"]
    big = TrainForm("sks", "dog", preset="quick", steps=7, rank=3).config("hub/id", 1024, tmp_path, tmp_path)
    assert (big["max_train_steps"], big["rank"], big["checkpointing_steps"]) == (7, 3, 1)


def test_masks_are_made_where_the_form_says_so(tmp_path):
    for make_masks, masks in ((True, "auto"), (False, "given")):
        form = TrainForm("sks", "dog", make_masks=make_masks)
        assert TrainConfig.from_dict(form.config("toy", 128, tmp_path / "photos", tmp_path)).masks == masks


@pytest.mark.parametrize(
    "form, word",
    [
        (TrainForm("", "dog"), "token"),
        (TrainForm("sks", " "), "class word"),
        (TrainForm("sks", "d" * 61), "too long"),
        (TrainForm("sks", "dog", preset="endless"), "endless"),
        (TrainForm("sks", "dog", steps=-1), "steps"),
        (TrainForm("sks", "dog", learning_rate=11), "learning rate"),
        (TrainForm("sks", "dog", rank=1.5), "rank"),
    ],
)
def test_a_form_that_makes_no_sense_is_refused_in_words(form, word, tmp_path):
    with pytest.raises(UserError, match=word):
        form.config("toy", 128, tmp_path, tmp_path)


def test_captions_lie_beside_their_photos(tmp_path):
    photos = [tmp_path / f"in{i}.png" for i in range(3)]
    for photo in photos:
        PIL.Image.new("RGB", (40, 40)).save(photo)
    folder = take_photos([str(p) for p in photos], tmp_path / "photos").folder
    TrainForm("sks", "dog", captions="first\n\nthird").write_captions(folder)
    assert {p.name: p.read_text() for p in folder.glob("*.txt")} == {"photo_01.txt": "first", "photo_03.txt": "third"}


def test_photos_are_numbered_as_they_are_taken_and_each_fault_is_told(tmp_path):
    def noise(seed: int, side: int = 160) -> PIL.Image.Image:
        pixels = np.random.default_rng(seed).integers(0, 255, (side, side + 8, 3), dtype=np.uint8)
        return PIL.Image.fromarray(pixels)

    turned = PIL.Image.Exif()
    turned[0x0112] = 6
    (tmp_path / "letter.jpg").write_text("hello")
    noise(1).save(tmp_path / "turned.png", exif=turned)
    noise(2).save(tmp_path / "good.png")
    noise(2).point(lambda value: value * 9 // 10).save(tmp_path / "twin.png")
    noise(3).filter(PIL.ImageFilter.GaussianBlur(4)).save(tmp_path / "soft.png")
    noise(4, 20).save(tmp_path / "tiny.png")
    names = ("letter.jpg", "turned.png", "good.png", "twin.png", "soft.png", "tiny.png")
    ann, ctx = visitor(tmp_path), SimpleNamespace(resolution_px=64, base_name="some/base")
    found = review_photos(ctx, [str(tmp_path / name) for name in names], ann)
    assert [p.name for p in sorted(ann.photos_dir.iterdir())] == [f"photo_0{n}.png" for n in range(1, 6)]
    for words in (
        "letter.jpg: broken",
        "photo 1: rotated",
        "photo 3: near-duplicate of photo_02",
        "photo 4: blurred",
        "photo 5: too small",
    ):
        assert words in found.remarks, (words, found.remarks)
    assert [caption == "good" for _, caption in found.crops] == [True, True, False, False, False]


@pytest.mark.parametrize("number", [float("nan"), float("inf"), 1.5, True, None, "7", 10**400])
def test_what_is_no_whole_number_is_refused_in_words(number, tmp_path):
    with pytest.raises(UserError):
        GenerateForm("a dog", steps=number).params()
    if number is not None:
        with pytest.raises(UserError, match="steps"):
            TrainForm("sks", "dog", steps=number).config("toy", 128, tmp_path, tmp_path)


def test_prompts_follow_from_two_words():
    assert prompts_of(" sks ", "guinea  pig") == ("a photo of a sks guinea pig", "a photo of a guinea pig")


@pytest.mark.parametrize("base, seed", [("toy", 0), ("toy", 7), ("some/base", 7)])
def test_the_crops_shown_are_those_of_the_very_run(tmp_path, base, seed):
    x, y = np.meshgrid(np.arange(400) % 256, np.arange(200))
    PIL.Image.fromarray(np.stack([x, y, x], 2).astype(np.uint8)).save(tmp_path / "wide.png")
    ann, ctx = visitor(tmp_path), SimpleNamespace(resolution_px=128, base_name=base)
    found = review_photos(ctx, [str(tmp_path / "wide.png")], ann, seed)
    config = TrainConfig.from_dict(TrainForm("sks", "dog", seed=seed).config(base, 128, ann.photos_dir, tmp_path))
    (photo,) = find_photos(ann.photos_dir, "", 128).photos
    plan = next(plans_of(photo, 0, config))
    shown = np.asarray(found.crops[0][0])
    assert np.array_equal(shown, np.asarray(apply_crop(open_rgb(photo), plan)))
    centre = plan_crop(photo.size_px, (128, 128), random.Random(0), center_crop=True)
    assert not np.array_equal(shown, np.asarray(apply_crop(open_rgb(photo), centre)))
    assert ("first of its 8 crops" in found.remarks) == (base == "toy")
