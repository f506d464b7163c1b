"""The token, the class word, and the templates."""

from dataclasses import replace

import pytest

from dreambooth_moslora.core import TOY_TEMPLATES
from dreambooth_moslora.settings.prompts import (
    DREAMBOOTH_LIVE_TEMPLATES,
    DREAMBOOTH_OBJECT_TEMPLATES,
    context_prompts,
    subject_of,
    trigger_words,
    validation_prompts,
)
from dreambooth_moslora.settings.table import TrainConfig


@pytest.mark.parametrize(
    ("settings", "token", "word"),
    [
        ({"instance_prompt": "a photo of sks dog"}, "sks", "dog"),
        ({"instance_prompt": "A photo of a sks dog on the beach"}, "sks", "dog"),
        ({"instance_prompt": "sks"}, "sks", ""),
        ({"instance_prompt": "a photo of TOK toy robot", "class_prompt": "a photo of a toy robot"}, "TOK", "toy robot"),
        ({"instance_prompt": "a photo of my red sks dog", "class_prompt": "a dog"}, "red sks", "dog"),
        ({"instance_prompt": "an image of ohwx man, smiling", "class_prompt": "a photo of a man"}, "ohwx", "man"),
        ({"instance_prompt": "the zwx clock in a box", "token": "zwx"}, "zwx", "clock"),
        ({"instance_prompt": "a photo of a hot dog", "token": "hot"}, "hot", "dog"),
        ({"instance_prompt": "a photo of a cup", "token": "hot"}, "hot", ""),
        ({"instance_prompt": "zwx", "token": "zwx", "class_word": "clock"}, "zwx", "clock"),
    ],
)
def test_token_and_class_word_are_found(settings, token, word):
    found = subject_of(TrainConfig(**settings))
    assert (found.token, found.class_word) == (token, word)
    assert trigger_words(TrainConfig(**settings)) == (f"{token} {word}".strip(),)


def test_the_templates_are_25_each_and_take_the_subject_once():
    assert len(set(DREAMBOOTH_OBJECT_TEMPLATES)) == len(set(DREAMBOOTH_LIVE_TEMPLATES)) == 25
    for template in (*DREAMBOOTH_OBJECT_TEMPLATES, *DREAMBOOTH_LIVE_TEMPLATES, *TOY_TEMPLATES):
        assert template.count("{}") == 1


def test_toy_templates_name_the_places_that_the_embedded_base_knows():
    from toybox.drawing.places import PLACES

    assert tuple(f"a photo of a {{}} {place}" for place in PLACES) == TOY_TEMPLATES


def test_samples_are_of_the_validation_prompt_or_the_instance_prompt():
    assert validation_prompts(TrainConfig(instance_prompt="sks dog")) == ("sks dog",)
    assert validation_prompts(TrainConfig(instance_prompt="sks dog", validation_prompt="v")) == ("v",)
    assert all("sks dog" in prompt for prompt in context_prompts(TrainConfig(instance_prompt="a photo of sks dog")))


def test_an_empty_token_is_none():
    config = TrainConfig(instance_prompt="a photo of sks dog", class_prompt="a dog")
    assert subject_of(replace(config, token="")) == subject_of(replace(config, token=" ")) == subject_of(config)
