"""The page's training form: the config that it makes, the photos and captions that it takes."""

import random
from types import SimpleNamespace

import numpy as np
import PIL.Image
import PIL.ImageFilter
import pytest

from dreambooth_moslora.core import UserError
from dreambooth_moslora.photos.crops import CropRule, apply_crop, plans_of
from dreambooth_moslora.photos.folder import find_photos
from dreambooth_moslora.photos.photo import open_rgb
from dreambooth_moslora.settings.sources import load_settings
from dreambooth_moslora.settings.table import TrainConfig
from dreambooth_moslora.ui.generate_form import GenerateForm
from dreambooth_moslora.ui.train_form import TrainForm, prompts_of
from dreambooth_moslora.ui.train_photos import review_kept, take_with_masks
from dreambooth_moslora.ui.visitors import take_photos
from tests.ui.test_handlers import visitor


@pytest.fixture
def photos(tmp_path):
    (tmp_path / "photos").mkdir()
    for number in (1, 2):
        PIL.Image.effect_noise((128, 128), 80).convert("RGB").save(tmp_path / "photos" / f"photo_0{number}.png")
    return tmp_path / "photos"


def config_of(photos, base: str = "toy", **form) -> TrainConfig:
    form = TrainForm("sks", "dog", **form)
    return TrainConfig.from_dict(form.config(base, 128, photos, photos.parent / "run"))


def test_the_form_alone_begins_with_the_recipe(photos):
    config, toy = config_of(photos), load_settings("assets/configs/toy.toml")
    assert (config.instance_prompt, config.class_prompt) == ("a photo of a sks dog", "a photo of a dog")
    for name in ("target_modules", "prior_prompts", "rank", "learning_rate", "crops_per_photo", "prior_loss_weight"):
        assert getattr(config, name) == (tuple(toy[name]) if isinstance(toy[name], list) else toy[name]), name
    assert (config.exposures_per_photo, config.max_train_steps, config.masks) == (384, None, "auto")


def test_each_setting_of_the_form_arrives_in_the_config(photos):
    form = {"steps": 7, "rank": 3, "learning_rate": 0.5, "mixer": "none", "seed": 9, "unmasked_weight": 0}
    config = config_of(photos, **form)
    assert (config.max_train_steps, config.exposures_per_photo, config.evaluate_steps) == (7, None, 1)
    assert (config.rank, config.learning_rate, config.mixer, config.seed, config.unmasked_weight) == (
        3,
        0.5,
        "none",
        9,
        0,
    )
    for preset, exposures in (("quick", 192), ("thorough", 768)):
        assert config_of(photos, preset=preset).exposures_per_photo == exposures
    held = config_of(photos, prior="class_images", prior_weight=4)
    assert (held.with_prior_preservation, held.prior, held.prior_loss_weight) == (True, "class_images", 4)
    free = config_of(photos, prior_preservation=False, prior="class_images", prior_weight=4)
    assert (free.with_prior_preservation, free.class_prompt, free.prior_prompts) == (False, None, ())
    assert config_of(photos).token is None


@pytest.mark.parametrize("base, usual", [("toy", True), ("owner/sdxl", False)])
def test_masks_and_scores_are_chosen_by_the_base_unless_the_form_says_so(photos, monkeypatch, base, usual):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(photos.parent))
    for value in (None, True, False):
        config = config_of(photos, base, make_masks=value, scores=value)
        wanted = usual if value is None else value
        assert (config.masks == "auto", bool(config.evaluate_steps), config.find_scale) == (wanted,) * 3
        said = dict(TrainForm("sks", "dog", make_masks=value, scores=value).choices(base, 128, photos, photos).said)
        reasons = {words.partition(":")[0] for words in said}
        assert ("masks" in reasons) == (wanted == usual) and ("scores" in reasons) == (wanted or not usual)


@pytest.mark.parametrize(
    "form, word",
    [
        (TrainForm("", "dog"), "token"),
        (TrainForm("sks", " "), "word for what the photos show"),
        (TrainForm("sks", "d" * 61), "too long"),
        (TrainForm("sks", "dog", preset="endless"), "endless"),
        (TrainForm("sks", "dog", steps=-1), "steps"),
        (TrainForm("sks", "dog", learning_rate=11), "learning rate"),
        (TrainForm("sks", "dog", rank=1.5), "rank"),
        (TrainForm("sks", "dog", memory="little"), "there is no memory 'little'"),
        (TrainForm("sks", "dog", memory=None), "there is no memory None"),
        (TrainForm("sks", "dog", prior=["x"]), "there is no prior"),
        (TrainForm("sks", "dog", prior_weight=101), "prior weight"),
        (TrainForm("sks", "dog", unmasked_weight=1.01), "weight outside the mask"),
        (TrainForm("sks", "dog", unmasked_weight=float("nan")), "weight outside the mask"),
        (TrainForm("sks", "dog", scores="yes"), "scores must be true or false"),
        (TrainForm("sks", "dog", make_masks=[]), "make_masks must be true or false"),
        (TrainForm("sks", "dog", make_captions="on"), "make_captions must be true or false"),
        (TrainForm("sks", "dog"), "none of the photos can be used"),
    ],
)
def test_a_form_that_makes_no_sense_is_refused_in_words(form, word, tmp_path):
    with pytest.raises(UserError, match=word):
        form.config("toy", 128, tmp_path, tmp_path)


def test_captions_are_made_where_the_form_says_so(photos):
    assert [config_of(photos, make_captions=made).captions for made in (False, True)] == ["given", "auto"]
    assert TrainForm("sks", "dog").make_captions is False


def test_captions_lie_beside_their_photos(tmp_path):
    photos = [tmp_path / f"in{i}.png" for i in range(3)]
    for photo in photos:
        PIL.Image.new("RGB", (40, 40)).save(photo)
    take_photos([str(p) for p in photos], folder := tmp_path / "photos")
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
    found = review_kept(ctx, ann, take_with_masks([str(tmp_path / name) for name in names], ann))
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
    found = review_kept(ctx, ann, take_with_masks([str(tmp_path / "wide.png")], ann), seed)
    config = TrainConfig.from_dict(TrainForm("sks", "dog", seed=seed).config(base, 128, ann.photos_dir, tmp_path))
    (photo,) = find_photos(ann.photos_dir, "", 128).photos
    plan = next(plans_of(photo, 0, config))
    shown = np.asarray(found.crops[0][0])
    assert np.array_equal(shown, np.asarray(apply_crop(open_rgb(photo), plan)))
    centre = CropRule(128, center_crop=True).plan(photo.size_px, random.Random(0))
    assert not np.array_equal(shown, np.asarray(apply_crop(open_rgb(photo), centre)))
    assert ("first of its 12 crops" in found.remarks) == (base == "toy")
