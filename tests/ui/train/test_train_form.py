"""The form of the Train tab, each field of which is a row of its table: the settings that it makes,
and refuses."""

import PIL.Image
import PIL.ImageFilter
import pytest

from dreambooth_moslora.errors import UserError
from dreambooth_moslora.settings.setting_names import SETTINGS
from dreambooth_moslora.settings.train_config import TrainConfig
from dreambooth_moslora.ui.train.train_form import (
    TrainForm,
    list_form_fields,
)

DOG = {"token": "sks", "class_word": "dog"}


@pytest.fixture
def photos(tmp_path):
    (tmp_path / "photos").mkdir()
    for number in (1, 2):
        PIL.Image.effect_noise((128, 128), 80).convert("RGB").save(
            tmp_path / "photos" / f"photo_0{number}.png"
        )
    return tmp_path / "photos"


def build_config(photos, base: str = "toy", **values) -> TrainConfig:
    form = TrainForm(**DOG | values)
    return TrainConfig.from_dict(
        form.choose_settings(base, 128, photos, photos.parent / "run").all_settings
    )


def get_values(config: TrainConfig, *names: str) -> list:
    return [getattr(config, name) for name in names]


def test_prompts_and_settings_follow_from_the_words(photos):
    assert TrainForm(" sks ", "guinea  pig").build_prompts("toy") == (
        "a photo of a sks guinea pig",
        "a photo of a guinea pig",
    )
    assert TrainForm(class_word="ink", subject="style").build_prompts("toy") == (
        "a picture in ink style",
        None,
    )
    # What was typed before the kind was chosen stands in fields that a style does not show.
    hidden = {"token": "", "prior_weight": 0.5, "make_masks": True}
    form = TrainForm(class_word="ink", subject="style", **hidden)
    config = TrainConfig.from_dict(
        form.choose_settings("toy", 128, photos, photos.parent / "run").all_settings
    )
    assert get_values(config, "token", "masks", "prior_loss_weight") == ["ink", "given", 1.0]
    config = build_config(photos)
    assert (config.instance_prompt, config.class_prompt) == (
        "a photo of a sks dog",
        "a photo of a dog",
    )
    assert (config.exposures_per_photo, config.max_train_steps, config.masks) == (384, None, "auto")


def test_form_fields_reach_the_config(photos):
    form = {"rank": 3, "learning_rate": 0.5, "mixer": "none", "seed": 9, "unmasked_weight": 0}
    config = build_config(photos, steps=7, **form)
    assert {name: getattr(config, name) for name in form} == form
    assert get_values(config, "max_train_steps", "exposures_per_photo", "evaluate_steps") == [
        7,
        None,
        None,  # too short to be scored
    ]
    for preset, exposures in (("quick", 192), ("thorough", 768)):
        assert build_config(photos, preset=preset).exposures_per_photo == exposures
    assert build_config(photos, prior_weight=4).prior_loss_weight == 4
    names = ("with_prior_preservation", "class_prompt", "prior_prompts")
    free = build_config(photos, prior_preservation=False)
    assert get_values(free, *names) == [False, None, ()]
    assert [build_config(photos, make_captions=is_on).captions for is_on in (False, True)] == [
        "given",
        "auto",
    ]
    assert build_config(photos).token is None and TrainForm("sks", "dog").make_captions is False


@pytest.mark.parametrize("base, usual", [("toy", True), ("owner/sdxl", False)])
def test_base_decides_masks_and_scores_by_default(photos, monkeypatch, base, usual):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(photos.parent))
    for value in (None, True, False):
        config = build_config(photos, base, make_masks=value, scores=value)
        expected = usual if value is None else value
        assert (config.masks == "auto", bool(config.evaluate_steps)) == (expected, expected)
        notes = dict(
            TrainForm("sks", "dog", make_masks=value, scores=value)
            .choose_settings(base, 128, photos, photos)
            .notes
        )
        reasons = {note.partition(":")[0] for note in notes}
        assert ("masks" in reasons) == (expected == usual) and ("scores" in reasons) == (
            expected or not usual
        )


def test_every_row_fills_an_existing_setting():
    for name, row in list_form_fields().items():
        assert not row.setting or row.setting in SETTINGS, name
        first = row.get_first_value("toy") if row.is_by_recipe else row.default
        assert not row.values or first in row.values, name


RECIPE_VALUES = {
    "toy": {"rank": 16, "learning_rate": 2e-3, "prior_weight": 2.5, "batch_size": 4},
    "owner/sdxl": {"rank": 16, "learning_rate": 1e-4, "prior_weight": 1.0, "batch_size": 1},
}
RECIPE_VALUES["toy"] |= {"resolution": 128, "optimizer": "AdamW", "steps": None}
RECIPE_VALUES["owner/sdxl"] |= {"resolution": 1024, "optimizer": "AdamW"}


@pytest.mark.parametrize("base", RECIPE_VALUES)
def test_fields_show_the_recipes_values_and_send_changes_alone(base):
    """The form said "0: the recipe's", which told nobody what a run would use."""
    rows = list_form_fields()
    shown_values = {name: rows[name].get_first_value(base) for name in RECIPE_VALUES[base]}
    assert shown_values == RECIPE_VALUES[base]
    unchanged = TrainForm(**DOG).collect_changed_settings(base)
    assert TrainForm(**DOG | shown_values).collect_changed_settings(base) == unchanged
    changes = {"rank": 8, "batch_size": 2, "resolution": 96, "optimizer": "Lion"}
    changed = TrainForm(**DOG | shown_values | changes).collect_changed_settings(base)
    sent_changes = {"rank": 8, "train_batch_size": 2, "resolution": 96, "optimizer": "Lion"}
    assert changed == unchanged | sent_changes


def test_resolution_batch_and_sample_prompts_reach_the_config(photos):
    prompts = "a sks dog in snow\n\n a  sks dog at sea\n"
    config = build_config(photos, resolution=64, batch_size=2, sample_prompts=prompts)
    assert (config.resolution, config.train_batch_size) == (64, 2)
    assert config.validation_prompt == ("a sks dog in snow", "a sks dog at sea")


HALF = "a \ud800"
"""JSON can hold a lone surrogate."""
REFUSED = [
    ({"token": ""}, "token"),
    ({"class_word": " "}, "word for what the photos show"),
    ({"class_word": "d" * 61}, "too long"),
    *(({name: HALF}, "is not a character") for name in ("token", "class_word", "describe")),
    ({"steps": -1}, "--max_train_steps"),
    ({"learning_rate": float("nan")}, "--learning_rate"),
    ({"mixer": "little"}, "--mixer"),
]


@pytest.mark.parametrize("values, message", REFUSED)
def test_senseless_form_is_refused(toys, values, message):
    with pytest.raises(UserError, match=message) as error:
        build_config(toys.photos_dir, **values)
    assert str(error.value).encode()


def test_unusable_photos_are_reported(tmp_path):
    with pytest.raises(UserError, match="none of the photos can be used"):
        build_config(tmp_path)
