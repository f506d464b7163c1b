"""A field of the Train tab is one row of the form's table: the widgets, the settings, and the ways back follow."""

import inspect
from dataclasses import dataclass

import gradio as gr
import PIL.Image
import pytest

from dreambooth_moslora.core import UserError
from dreambooth_moslora.settings.sources import FoundRecipe
from dreambooth_moslora.settings.table import SETTINGS, TrainConfig
from dreambooth_moslora.ui.train import train_widgets
from dreambooth_moslora.ui.train_form import (
    MOST,
    TrainForm,
    asked,
    form_of,
    in_the_forms_words,
    rows,
    values_like,
    values_of,
)
from dreambooth_moslora.ui.train_start import form_of_run

API = (
    *("token", "class_word", "run_name", "preset", "prior_preservation", "captions", "rank", "learning_rate", "steps"),
    *("mixer", "seed", "make_masks", "memory", "prior", "prior_weight", "unmasked_weight", "scores", "make_captions"),
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
    PIL.Image.effect_noise((128, 128), 80).convert("RGB").save(tmp_path / "photos" / "photo_01.png")
    return tmp_path / "photos"


def settings_of(photos, **values) -> TrainConfig:
    form = form_of({"token": "sks", "class_word": "dog", **values}, Longer)
    return TrainConfig.from_dict(form.config("toy", 128, photos, photos.parent / "run"))


def test_a_row_more_is_a_widget_with_the_settings_own_words_bounds_and_choices():
    with gr.Blocks():
        fields, _ = train_widgets("toy", Longer)
    assert list(fields)[: len(API) + 3] == [*API, "dropout", "dora", "loss"]
    dropout, dora, loss = (fields[name] for name in ("dropout", "dora", "loss"))
    assert isinstance(dropout, gr.Number) and isinstance(dora, gr.Checkbox) and isinstance(loss, gr.Dropdown)
    assert (dropout.label, dropout.info, dropout.elem_id) == (
        "Dropout",
        SETTINGS["lora_dropout"].metadata["help"],
        "dropout",
    )
    assert (dora.info, [value for _, value in loss.choices]) == ("magnitudes too", ["l2", "huber", "smooth_l1"])
    assert dropout.parent is dora.parent is not loss.parent


def test_a_row_more_is_a_setting_of_the_run_and_comes_back_from_it(photos):
    plain, changed = settings_of(photos), settings_of(photos, dropout=0.25, dora=True, loss="huber")
    assert (plain.lora_dropout, plain.use_dora, plain.loss_type) == (0, False, "l2")
    assert (changed.lora_dropout, changed.use_dora, changed.loss_type) == (0.25, True, "huber")
    values = values_of(form_of_run(changed.to_dict(), photos, Longer))
    assert (values["dropout"], values["dora"], values["loss"]) == (0.25, True, "huber")
    like = values_like(FoundRecipe({"lora_dropout": 0.5, "use_dora": True}), "toy", Longer)
    assert (like["dropout"], like["dora"], like["loss"]) == (0.5, True, "l2")
    assert in_the_forms_words("try --lora_dropout 0.5", Longer) == "try “Dropout” 0.5"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"dropout": 1}, "the dropout must be a number from 0 to 0.99, not 1"),
        ({"dora": "yes"}, "dora must be true or false"),
        ({"loss": "l1"}, "there is no loss 'l1'; choose l2, huber, smooth_l1"),
    ],
)
def test_a_row_more_is_checked_by_the_settings_bounds(photos, values, words):
    with pytest.raises(UserError, match=words):
        settings_of(photos, **values)


def test_the_apis_order_is_that_of_the_table():
    assert tuple(rows(TrainForm)) == API
    assert tuple(inspect.signature(TrainForm).parameters) == (*API, "others")


def test_every_row_fills_a_setting_that_there_is_within_its_bounds():
    for name, row in rows(TrainForm).items():
        assert not row.setting or row.setting in SETTINGS, name
        assert not row.is_number or 0 < row.limit <= (row.row["high"] or 10**9), name
        assert not row.values or row.default in row.values, name
    assert MOST["rank"] == 256 and MOST["max_train_steps"] == 100_000 and MOST["crops_per_photo"] == 100
