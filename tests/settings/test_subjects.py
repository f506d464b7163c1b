"""Subjects of a run: one or several, their tokens, class words and templates."""

import json

import pytest

from dreambooth_moslora.errors import UserError
from dreambooth_moslora.settings import prompts, toy_bases
from dreambooth_moslora.settings.prompts import (
    list_context_prompts,
    list_trigger_words,
    list_validation_prompts,
    parse_subject,
)
from dreambooth_moslora.settings.train_config import TrainConfig
from tests.helpers.command_line import parse_train_config
from toybox.drawing.places import PLACES

BASE = ["--pretrained_model_name_or_path", "toy"]
DUCK = {
    "instance_data_dir": "a",
    "instance_prompt": "a photo of a sks duck",
    "class_prompt": "a photo of a duck",
}
DOG = {"instance_data_dir": "b", "instance_prompt": "a photo of a zwx dog"}
TOML = """
caption_prefix = "see,"
[[subjects]]
instance_data_dir = "a"
instance_prompt = "a photo of a sks duck"
class_prompt = "a photo of a duck"
[[subjects]]
instance_data_dir = "b"
instance_prompt = "a photo of a zwx dog"
caption_prefix = "look,"
[training]
rank = 3
"""


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / "two.toml").write_text(TOML)
    return ["--config", str(tmp_path / "two.toml")]


def test_tables_of_a_file_override_the_runs_settings(recipe):
    config = parse_train_config([*BASE, *recipe])
    duck, dog = config.each_subject
    shared = {"pretrained_model_name_or_path": "toy", "resolution": 128, "rank": 3}
    assert duck == TrainConfig(**shared, caption_prefix="see,", **DUCK)
    assert dog == TrainConfig(**shared, caption_prefix="look,", **DOG)
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert list_trigger_words(config) == ("sks duck", "zwx dog")
    assert list_validation_prompts(config) == (duck.instance_prompt, dog.instance_prompt)
    assert list_context_prompts(config)[-1] == "a photo of a sks duck and a zwx dog"


def test_a_run_without_tables_has_one_subject():
    config = TrainConfig(**DUCK)
    assert config.each_subject == (config,) == TrainConfig(subjects=[DUCK]).each_subject
    assert config.each_subject is config.each_subject, "they are made once"


def test_flags_for_one_subject_replace_a_files_tables(recipe, tmp_path, caplog):
    config = parse_train_config(
        [*BASE, *recipe, "--instance_data_dir", "c", "--instance_prompt", "a photo of x"]
    )
    assert (config.subjects, config.instance_data_dir, config.rank) == ((), "c", 3)
    assert "are left out, as others are given" in caplog.text
    (tmp_path / "one.toml").write_text(
        'instance_data_dir = "a"\ninstance_prompt = "a photo of x"\nrank = 5'
    )
    (tmp_path / "photos" / "sks dog").mkdir(parents=True)
    flags = ["--config", str(tmp_path / "one.toml"), "--subjects", str(tmp_path / "photos")]
    assert parse_train_config([*BASE, *flags]).rank == 5


def test_a_folder_of_folders_names_its_subjects(tmp_path):
    for name in ("sks duck", "10_zwx_big_dog", "mylo", ".cache"):
        (tmp_path / name).mkdir()
    (tmp_path / "notes.txt").write_text("for myself")
    subjects = parse_train_config([*BASE, "--subjects", str(tmp_path)]).each_subject
    assert [(subject.instance_prompt, subject.class_prompt) for subject in subjects] == [
        ("a photo of a zwx big dog", "a photo of a big dog"),
        ("a photo of mylo", None),
        ("a photo of a sks duck", "a photo of a duck"),
    ]
    assert subjects[2].instance_data_dir == str(tmp_path / "sks duck")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"subjects": [DUCK], "instance_data_dir": "c"},
            "--subjects and --instance_data_dir: each subject names",
        ),
        (
            {"subjects": [DUCK], "instance_prompt": "a photo of x"},
            "--subjects and --instance_prompt",
        ),
        ({"subjects": [{"instance_data_dir": "a"}]}, "number 1 has no instance_prompt"),
        ({"subjects": [DUCK, {"instance_prompt": "x"}]}, "number 2 has no instance_data_dir"),
        (
            {"subjects": [DUCK, {**DOG, "instance_data_dir": "./a"}]},
            "2 of them have the instance_data_dir 'a'",
        ),
        (
            {"subjects": [DUCK, {**DUCK, "instance_data_dir": "b"}]},
            "2 of them have the instance_prompt",
        ),
        (
            {"subjects": [{**DUCK, "rank": 3}]},
            "a subject has no setting `rank`; it may have instance_data_dir",
        ),
        (
            {"subjects": [DUCK, DOG], "with_prior_preservation": True},
            r"subject 2 \(b\): --with_prior_preservation",
        ),
        ({"subjects": [{**DUCK, "token": 3}]}, r"subject 1 \(a\): --token 3: expected text"),
        ({"subjects": [DUCK, 3]}, "expected a folder of folders"),
        ({"subjects": "nowhere"}, "--subjects nowhere: no such folder"),
    ],
)
def test_a_mistake_in_a_table_is_one_line_that_names_it(changes, says):
    with pytest.raises(UserError, match=says):
        TrainConfig.from_dict(changes)


def test_a_folder_without_folders_is_refused(tmp_path):
    with pytest.raises(UserError, match="there is no folder in it"):
        TrainConfig(subjects=str(tmp_path))


SKS_DOG = {"instance_prompt": "a photo of sks dog"}


@pytest.mark.parametrize(
    ("settings", "token", "word"),
    [
        (SKS_DOG, "sks", "dog"),
        ({"instance_prompt": "A photo of a sks dog on the beach"}, "sks", "dog"),
        ({"instance_prompt": "sks"}, "sks", ""),
        (
            {
                "instance_prompt": "a photo of TOK toy robot",
                "class_prompt": "a photo of a toy robot",
            },
            "TOK",
            "toy robot",
        ),
        (
            {"instance_prompt": "a photo of my red sks dog", "class_prompt": "a dog"},
            "red sks",
            "dog",
        ),
        (
            {
                "instance_prompt": "an image of ohwx man, smiling",
                "class_prompt": "a photo of a man",
            },
            "ohwx",
            "man",
        ),
        ({"instance_prompt": "the zwx clock in a box", "token": "zwx"}, "zwx", "clock"),
        ({"instance_prompt": "a photo of a hot dog", "token": "hot"}, "hot", "dog"),
        ({"instance_prompt": "a photo of a cup", "token": "hot"}, "hot", ""),
        ({"instance_prompt": "zwx", "token": "zwx", "class_word": "clock"}, "zwx", "clock"),
        *(
            ({**SKS_DOG, "class_prompt": "a dog", "token": empty}, "sks", "dog")
            for empty in ("", " ")
        ),
    ],
)
def test_token_and_class_word_are_found(settings, token, word):
    subject = parse_subject(TrainConfig(**settings))
    assert (subject.token, subject.class_word) == (token, word)
    assert list_trigger_words(TrainConfig(**settings)) == (f"{token} {word}".strip(),)


def test_templates_name_the_subject_once():
    objects, live = prompts.DREAMBOOTH_OBJECT_TEMPLATES, prompts.DREAMBOOTH_LIVE_TEMPLATES
    assert len(set(objects)) == len(set(live)) == 25
    assert all(template.count("{}") == 1 for template in (*objects, *live))
    assert tuple(f"a photo of a {{}} {place}" for place in PLACES) == toy_bases.PLACE_TEMPLATES


def test_sample_prompts_default_to_the_instance_prompt():
    config = TrainConfig(**SKS_DOG)
    assert list_validation_prompts(config) == (config.instance_prompt,)
    assert list_validation_prompts(TrainConfig(validation_prompt="v", **SKS_DOG)) == ("v",)
    prompts = ("a dog, running", "a dog asleep")
    assert list_validation_prompts(TrainConfig(validation_prompt=prompts, **SKS_DOG)) == prompts
    assert all("sks dog" in prompt for prompt in list_context_prompts(TrainConfig(**SKS_DOG)))


def test_context_prompts_of_a_style_end_with_its_name():
    style = {"instance_prompt": "a picture in ink style", "subject": "style"}
    for base in ("toy", "some/base"):
        context_prompts = list_context_prompts(
            TrainConfig(pretrained_model_name_or_path=base, **style)
        )
        assert len(context_prompts) == 4
        assert all(prompt.endswith(" in ink style") for prompt in context_prompts)
