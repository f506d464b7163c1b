"""Rules between settings: those that have no effect together are remarked on, and rows name settings that exist."""

import shlex

import pytest

from dreambooth_moslora.cli.parser import parse_train_config
from dreambooth_moslora.settings.fields import WORDS
from dreambooth_moslora.settings.rules import remarks
from dreambooth_moslora.settings.table import SETTINGS, TrainConfig
from tests.settings.test_train_config import NEEDED, answers_in


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"mixer": "none", "max_train_steps": 3, "optimizer": "Prodigy", "learning_rate": 1.0},
        {"class_prompt": "a dog", "class_data_dir": "dogs", "with_prior_preservation": True},
        {"lr_warmup_steps": 0, "caption_model": "", "unmasked_weight": 0.0, "random_flip": False},
        {"train_text_encoder_ti": True, "text_encoder_lr": 1e-5, "num_new_tokens_per_abstraction": 3},
    ],
)
def test_settings_that_have_an_effect_or_switch_something_off_draw_no_remark(settings):
    assert remarks(TrainConfig(**settings)) == []


@pytest.mark.parametrize("name", SETTINGS)
def test_a_row_says_only_words_that_are_known(name):
    facts = SETTINGS[name].metadata
    assert facts["publish"] in (None, "always", "if_changed") and facts["resume"] in (None, "same")
    assert {*facts["yields_to"], *facts["replaces"]} <= {*SETTINGS, WORDS}
    if facts["choices"]:
        assert {*facts["spellings"].values(), *facts["packages"]} <= {*facts["choices"]}
    for words, applies in facts["idle"]:
        assert words.format_map(vars(TrainConfig())) and isinstance(bool(applies(TrainConfig())), bool)


REMARKS = answers_in("remarks.txt")


@pytest.mark.parametrize("words", REMARKS)
def test_a_setting_that_goes_badly_with_the_others_is_named_once(words):
    assert remarks(parse_train_config([*NEEDED, *shlex.split(words)])) == [REMARKS[words]]
