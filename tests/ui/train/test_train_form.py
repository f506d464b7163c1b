"""The form of the Train tab, each field of which is a row of its table: the settings that it makes,
and refuses."""

import inspect
import shutil
from dataclasses import dataclass

import gradio as gr
import PIL.Image
import PIL.ImageFilter
import pytest

from dreambooth_moslora.disk.paths import assets_folder
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.settings.prompts import learnt_words
from dreambooth_moslora.settings.sources import FoundRecipe, load_settings
from dreambooth_moslora.settings.table import SETTINGS, TrainConfig, checked_setting
from dreambooth_moslora.ui.train.screen import train_widgets
from dreambooth_moslora.ui.train.train_form import (
    TOKENS_RATE,
    TrainForm,
    asked,
    folder_of,
    form_of,
    in_the_forms_words,
    prompts_of,
    rows,
    values_like,
    values_of,
)
from dreambooth_moslora.ui.train.train_start import form_of_run
from tests.ui.conftest import ROCKET, TWO

DOG = {"token": "sks", "class_word": "dog"}
DUCK_AND_ROCKET = {
    "token": "sks",
    "class_word": "duck",
    "subjects": 2,
    "class_word_2": "rocket",
    "token_2": "zwx",
}
API = (
    *(
        "token",
        "class_word",
        "run_name",
        "preset",
        "prior_preservation",
        "captions",
        "rank",
        "learning_rate",
        "steps",
    ),
    *(
        "mixer",
        "seed",
        "make_masks",
        "memory",
        "prior",
        "prior_weight",
        "unmasked_weight",
        "scores",
        "make_captions",
    ),
    *("new_tokens", "tokens_begin_as", "tokens_learning_rate", "begin_with", "like"),
)
"""The arguments of `/train` after the photos: programs may give them by their places."""


@dataclass(frozen=True)
class Longer(TrainForm):
    dropout: float = asked(0.0, "Dropout", line=17, setting="lora_dropout")
    dora: bool = asked(False, "DoRA", "magnitudes too", line=17, setting="use_dora")
    loss: str = asked("l2", "Loss", line=18, setting="loss_type")


@pytest.fixture
def photos(tmp_path):
    (tmp_path / "photos").mkdir()
    for number in (1, 2):
        PIL.Image.effect_noise((128, 128), 80).convert("RGB").save(
            tmp_path / "photos" / f"photo_0{number}.png"
        )
    return tmp_path / "photos"


def config_of(
    photos, base: str = "toy", form: type[TrainForm] = TrainForm, **values
) -> TrainConfig:
    config = form_of(DOG | values, form).config(base, 128, photos, photos.parent / "run")
    return TrainConfig.from_dict(config)


def values_in(config: TrainConfig, *names: str) -> list:
    return [getattr(config, name) for name in names]


def test_prompts_follow_from_two_words_and_the_run_from_both(photos):
    assert prompts_of(" sks ", "guinea  pig") == (
        "a photo of a sks guinea pig",
        "a photo of a guinea pig",
    )
    config = config_of(photos)
    assert (config.instance_prompt, config.class_prompt) == (
        "a photo of a sks dog",
        "a photo of a dog",
    )
    assert (config.exposures_per_photo, config.max_train_steps, config.masks) == (384, None, "auto")


def test_each_setting_of_the_form_arrives_in_the_config(photos):
    form = {"rank": 3, "learning_rate": 0.5, "mixer": "none", "seed": 9, "unmasked_weight": 0}
    config = config_of(photos, steps=7, **form)
    assert {name: getattr(config, name) for name in form} == form
    assert values_in(config, "max_train_steps", "exposures_per_photo", "evaluate_steps") == [
        7,
        None,
        1,
    ]
    for preset, exposures in (("quick", 192), ("thorough", 768)):
        assert config_of(photos, preset=preset).exposures_per_photo == exposures
    kept = {"prior": "class_images", "prior_weight": 4}
    names = (
        "with_prior_preservation",
        "prior",
        "prior_loss_weight",
        "class_prompt",
        "prior_prompts",
    )
    assert values_in(config_of(photos, **kept), *names[:3]) == [True, "class_images", 4]
    free = config_of(photos, prior_preservation=False, **kept)
    assert values_in(free, names[0], *names[3:]) == [False, None, ()]
    assert [config_of(photos, make_captions=made).captions for made in (False, True)] == [
        "given",
        "auto",
    ]
    assert config_of(photos).token is None and TrainForm("sks", "dog").make_captions is False


@pytest.mark.parametrize("base, usual", [("toy", True), ("owner/sdxl", False)])
def test_masks_and_scores_are_chosen_by_the_base_unless_the_form_says_so(
    photos, monkeypatch, base, usual
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(photos.parent))
    for value in (None, True, False):
        config = config_of(photos, base, make_masks=value, scores=value)
        wanted = usual if value is None else value
        assert (config.masks == "auto", bool(config.evaluate_steps), config.find_scale) == (
            wanted,
        ) * 3
        said = dict(
            TrainForm("sks", "dog", make_masks=value, scores=value)
            .choices(base, 128, photos, photos)
            .said
        )
        reasons = {words.partition(":")[0] for words in said}
        assert ("masks" in reasons) == (wanted == usual) and ("scores" in reasons) == (
            wanted or not usual
        )


def test_a_row_more_is_a_widget_with_the_settings_own_words_bounds_and_choices():
    with gr.Blocks():
        fields, _ = train_widgets("toy", Longer)
    assert list(fields)[: len(API) + 3] == [*API, "dropout", "dora", "loss"]
    dropout, dora, loss = (fields[name] for name in ("dropout", "dora", "loss"))
    assert (
        isinstance(dropout, gr.Number)
        and isinstance(dora, gr.Checkbox)
        and isinstance(loss, gr.Dropdown)
    )
    words = ("Dropout", SETTINGS["lora_dropout"].metadata["help"], "dropout")
    assert (dropout.label, dropout.info, dropout.elem_id) == words
    assert (dora.info, [value for _, value in loss.choices]) == (
        "magnitudes too",
        ["l2", "huber", "smooth_l1"],
    )
    assert dropout.parent is dora.parent is not loss.parent


def test_a_row_more_is_a_setting_of_the_run_and_comes_back_from_it(photos):
    settings, changed = (
        ("lora_dropout", "use_dora", "loss_type"),
        {"dropout": 0.25, "dora": True, "loss": "huber"},
    )
    assert values_in(config_of(photos, form=Longer), *settings) == [0, False, "l2"]
    config = config_of(photos, form=Longer, **changed)
    assert values_in(config, *settings) == [0.25, True, "huber"]
    assert changed.items() <= values_of(form_of_run(config.to_dict(), photos, Longer)).items()
    like = values_like(FoundRecipe({"lora_dropout": 0.5, "use_dora": True}), "toy", Longer)
    assert (like["dropout"], like["dora"], like["loss"]) == (0.5, True, "l2")
    assert in_the_forms_words("try --lora_dropout 0.5", Longer) == "try “Dropout” 0.5"


def test_the_apis_order_is_the_tables_and_every_row_fills_an_existing_setting_within_its_bounds():
    assert tuple(rows(TrainForm)) == API
    assert tuple(inspect.signature(TrainForm).parameters) == (*API, "others")
    for name, row in rows(TrainForm).items():
        assert not row.setting or row.setting in SETTINGS, name
        assert not row.is_number or 0 < row.limit <= (row.row["high"] or 10**9), name
        assert not row.values or row.default in row.values, name


HALF = "a \ud800"
"""JSON can hold a lone surrogate."""
NO_STEPS = (-1, float("nan"), float("inf"), 1.5, True, "7", 10**400)
TWO_CATS = {
    "subjects": 3,
    "class_word_2": "cat",
    "token_2": "a",
    "class_word_3": "hen",
    "token_3": "b",
}
REFUSED = [
    ({"token": ""}, "token"),
    ({"class_word": " "}, "word for what the photos show"),
    ({"class_word": "d" * 61}, "too long"),
    *(({name: HALF}, "is not a character") for name in ("token", "class_word", "captions")),
    (
        {"captions": "short\n" + "ä" * 16385},
        "the caption of photo 2 is longer than captions may be, 32 KiB",
    ),
    ({"preset": "endless"}, "endless"),
    *(({"steps": number}, "steps") for number in NO_STEPS),
    ({"learning_rate": 11}, "learning rate"),
    ({"rank": 1.5}, "rank"),
    ({"memory": "little"}, "there is no memory 'little'"),
    ({"memory": None}, "there is no memory None"),
    ({"prior": ["x"]}, "there is no prior"),
    *(({"prior_weight": weight}, "the prior weight must be a number") for weight in (101, "x")),
    ({"unmasked_weight": 1.01}, "weight outside the mask"),
    ({"unmasked_weight": float("nan")}, "weight outside the mask"),
    ({"scores": "yes"}, "scores must be true or false"),
    ({"make_masks": []}, "make_masks must be true or false"),
    ({"make_captions": "on"}, "make_captions must be true or false"),
    ({"new_tokens": "yes"}, "new_tokens must be true or false"),
    ({"new_tokens": True, "tokens_learning_rate": -1}, "learning rate of the new tokens"),
    ({"new_tokens": True, "tokens_learning_rate": "x"}, "learning rate of the new tokens"),
    ({"dropout": 1}, "the dropout must be a number from 0 to 0.99, not 1"),
    ({"dora": "yes"}, "dora must be true or false"),
    ({"loss": "l1"}, "there is no loss 'l1'; choose l2, huber, smooth_l1"),
    ({"subjects": 5}, "subjects must be a whole number from 1 to 4"),
    *(({"subjects": number}, "subjects must be") for number in (True, [], float("nan"))),
    ({"class_word_2": "cat"}, "with class_word_2, subjects must be at least 2, not 1"),
    ({"photos_2": ["a.png"]}, "with photos_2, subjects must be at least 2, not 1"),
    ({"subjects": 2, "token_2": "zwx"}, "subject 2: the word for what the photos show"),
    ({"subjects": 2, "class_word_2": "cat"}, "subject 2: the token"),
    (
        {"subjects": 2, "class_word_2": "dog", "token_2": "sks"},
        "two subjects are called “a photo of a sks dog”",
    ),
    (TWO_CATS, "add some photos of subject 3 first"),
]


@pytest.mark.parametrize("values, words", REFUSED)
def test_a_form_that_makes_no_sense_is_refused_in_words(toys, values, words):
    with pytest.raises(UserError, match=words) as told:
        config_of(toys.photos_dir, form=Longer, **values)
    assert str(told.value).encode()


def test_photos_of_which_none_can_be_used_are_told(tmp_path):
    with pytest.raises(UserError, match="none of the photos can be used"):
        config_of(tmp_path)


def test_the_config_of_two_subjects_is_that_of_a_file_with_two_tables_and_of_a_folder_of_folders(
    toys, tmp_path
):
    """The file has the toy's recipe, two tables, and the lines that the form prints."""
    lines = (assets_folder() / "configs" / "toy.toml").read_text().splitlines()
    gone = (
        "instance_data_dir",
        "output_dir",
        "instance_prompt",
        "class_prompt",
        "max_train_steps",
        "validation_steps",
    )
    tables = [
        f'[[subjects]]\ninstance_data_dir = "{folder_of(toys.photos_dir, number)}"\n'
        f'instance_prompt = "a photo of a {words}"\n'
        f'class_prompt = "a photo of a {words.split()[1]}"'
        for number, words in enumerate(("sks duck", "zwx rocket"), 1)
    ]
    own = [
        f'output_dir = "{toys.root / "run"}"',
        "exposures_per_photo = 384",
        'masks = "auto"',
        "find_scale = true",
    ]
    own += ["evaluate_steps = 240", "validation_steps = 240"]
    (tmp_path / "two.toml").write_text(
        "\n".join([*own, *(line for line in lines if not line.startswith(gone)), *tables])
    )
    of_file = TrainConfig.from_dict(load_settings(tmp_path / "two.toml"))
    assert config_of(toys.photos_dir, **DUCK_AND_ROCKET) == of_file
    shutil.copytree(toys.photos_dir, tmp_path / "both" / "sks duck")
    shutil.copytree(folder_of(toys.photos_dir, 2), tmp_path / "both" / "zwx rocket")
    others = checked_setting("subjects", tmp_path / "both")
    for mine, other in zip(
        TWO.given("toy", 128, toys.photos_dir, tmp_path)["subjects"], others, strict=True
    ):
        assert mine | {"instance_data_dir": other.instance_data_dir} == other.to_dict()


def test_one_subject_is_as_without_the_others_fields(photos):
    alone = TrainForm(**DOG)
    assert (
        form_of(DOG | {"subjects": 1, "class_word_2": "", "token_2": "zwx"})
        == alone
        == form_of(DOG)
    )
    assert form_of(DUCK_AND_ROCKET | {"captions_2": ROCKET.captions}) == TWO
    config = config_of(photos)
    assert config.instance_data_dir == str(photos) and not config.subjects


def test_new_tokens_are_a_tick_with_words_which_are_the_flags(photos):
    words, plain = {"tokens_begin_as": " toy  duck "}, config_of(photos).to_dict()
    ticked = config_of(photos, new_tokens=True, **words).to_dict()
    flags = {
        "train_text_encoder_ti": True,
        "text_encoder_lr": TOKENS_RATE,
        "initializer_concept": "toy duck",
    }
    assert {name: value for name, value in ticked.items() if plain[name] != value} == flags
    assert config_of(photos, tokens_learning_rate=0.5, **words).to_dict() == plain
    rate = config_of(photos, new_tokens=True, tokens_learning_rate=1e-4)
    assert values_in(rate, "text_encoder_lr", "initializer_concept") == [1e-4, None]


def test_each_of_several_subjects_says_what_its_own_tokens_begin_as(toys):
    words = DUCK_AND_ROCKET | {"tokens_begin_as": "toy duck", "tokens_begin_as_2": " red  rocket "}
    config = config_of(toys.photos_dir, new_tokens=True, **words)
    flags = ("train_text_encoder_ti", "text_encoder_lr", "initializer_concept")
    assert values_in(config, *flags) == [True, TOKENS_RATE, None] and learnt_words(config) == (
        "sks",
        "zwx",
    )
    plain = config_of(toys.photos_dir, **words)
    begin = [[table.initializer_concept for table in one.subjects] for one in (config, plain)]
    assert begin == [["toy duck", "red rocket"], [None, None]]
