"""What a file tells of its run beside the recipe, and what a reader concludes from it."""

from dataclasses import replace
from pathlib import Path

import pytest

from dreambooth_moslora.adapters.metadata import AdapterMetadata, concluded, told_by, with_told
from dreambooth_moslora.settings.prompts import class_word_of, trigger_words
from dreambooth_moslora.settings.sources import load_settings
from dreambooth_moslora.settings.table import TrainConfig

CONFIGS = Path(__file__).parents[2] / "assets" / "configs"
PROMPTS = tuple(load_settings(CONFIGS / "toy.toml")["prior_prompts"])


def told(config: TrainConfig) -> AdapterMetadata:
    words = {"trigger_words": trigger_words(config), "class_word": class_word_of(config), "base_id": "toy"}
    return with_told(config, AdapterMetadata(4, 4, **words))


def recipe(name: str, **changes) -> TrainConfig:
    return TrainConfig.from_dict(load_settings(CONFIGS / f"{name}.toml") | changes)


@pytest.mark.parametrize("name", ["quickstart", "toy", "overtrained"])
def test_the_header_of_an_unchanged_recipe_does_not_grow(name):
    facts, config = told(recipe(name)), recipe(name)
    assert not told_by(facts) and "public" not in facts.to_json() and "withheld" not in facts.to_json()
    found = concluded(AdapterMetadata.from_json(facts.to_json()))
    assert (found["instance_prompt"], found["prior_prompts"]) == (config.instance_prompt, config.prior_prompts)


def test_the_prompts_of_a_recipe_are_told_and_a_persons_own_are_named():
    facts = told(recipe("toy", rank=3))
    assert (facts.public, facts.withheld) == ({"prior_prompts": PROMPTS}, ())
    assert concluded(AdapterMetadata.from_json(facts.to_json()))["prior_prompts"] == PROMPTS
    own = told(recipe("toy", rank=3, prior_prompts=[*PROMPTS, "alice"], leave_out=["alice.png"]))
    assert (own.public, set(own.withheld)) == ({}, {"prior_prompts", "leave_out"}) and "alice" not in own.to_json()
    none = told(recipe("toy", prior_prompts=[]))
    assert none.public == {"prior_prompts": ()} and concluded(none)["prior_prompts"] == ()


def test_only_what_shapes_the_run_is_named():
    idle = {"mask_prompt": "alice", "class_data_dir": "/alice"}
    idle |= {"initializer_concept": "alice", "revision": "alice", "prior_prompts": ["alice"], "token": "sks"}
    assert not told_by(told(TrainConfig(instance_prompt="a photo of a sks dog", class_prompt="a dog", **idle)))
    one = {"instance_data_dir": "/alice", "instance_prompt": "alice", "class_prompt": "a dog"}
    two = one | {"instance_data_dir": "/bob", "instance_prompt": "bob"}
    assert told(TrainConfig(subjects=[one, two], with_prior_preservation=True)).withheld == ("subjects",)
    words = told(TrainConfig(instance_prompt="a drawing of alice", init_adapter="/alice"))
    assert words.withheld == ("instance_prompt", "init_adapter")
    sdxl = {"pretrained_model_name_or_path": "other/base", "revision": "alice", "mask_model": "/alice"}
    found = told(TrainConfig(instance_prompt="a photo of a sks dog", masks="auto", variant="fp16", **sdxl))
    assert (found.public, found.withheld) == ({"variant": "fp16"}, ("revision", "mask_model"))


@pytest.mark.parametrize(
    "public", [{"output_dir": "/etc"}, {"variant": "../x"}, {"variant": ["fp16"]}, {"prior_prompts": "a"}, []]
)
def test_a_strangers_header_may_only_hold_what_a_file_tells(public):
    with pytest.raises(ValueError, match="public"):
        AdapterMetadata.from_json(replace(AdapterMetadata(4, 4), public=public or {"x": 1}).to_json())
