"""What a file tells of its run beside the recipe, what a reader concludes from it, and the strength that it wants."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dreambooth_moslora.adapters.metadata import AdapterMetadata, concluded, told_by, with_told
from dreambooth_moslora.adapters.published_file import note_scale
from dreambooth_moslora.adapters.raw_file import read_tensors
from dreambooth_moslora.settings.prompts import class_word_of, trigger_words
from dreambooth_moslora.settings.sources import load_settings
from dreambooth_moslora.settings.table import TrainConfig
from dreambooth_moslora.training.explain import choose_scale
from dreambooth_moslora.training.model_card import with_strength
from dreambooth_moslora.ui.generate_values import summary_of
from tests.helpers.tiny import tiny_unet
from tests.helpers.tiny_adapters import save_diffusers_lora

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


@pytest.mark.parametrize(
    ("scores", "best", "usable"),
    [
        ({0.4: 0.2, 0.6: 0.5, 0.8: 0.6, 1.0: 0.58, 1.2: 0.3}, 0.8, (0.8, 1.0)),
        ({0.4: 0.2, 0.6: 0.5, 0.8: 0.600, 1.0: 0.598, 1.2: 0.597}, 1.0, (0.8, 1.2)),  # all as good: as trained
        ({0.4: 0.6, 0.6: 0.3, 0.8: 0.6, 1.0: 0.2, 1.2: 0.1}, 0.8, (0.8, 0.8)),  # a gap ends the range
        ({0.4: 0.1, 0.6: 0.2, 0.8: 0.3, 1.0: 0.4, 1.2: 0.5}, 1.2, (1.2, 1.2)),
    ],
)
def test_the_best_scale_and_the_range_around_it(scores, best, usable):
    found = choose_scale(scores)
    assert (found.best, (found.low, found.high)) == (best, usable)
    assert f"best scale is {best:g}" in found.sentence()
    assert choose_scale(dict.fromkeys(scores, 0.0)) is None, "none shows the subject"


def test_a_header_without_scales_is_as_it_was_and_a_wrong_one_is_refused():
    facts = AdapterMetadata(4, 4.0)
    assert "scale" not in facts.to_json()
    known = replace(facts, best_scale=0.8, usable_scales=(0.6, 1.0))
    assert AdapterMetadata.from_json(known.to_json()) == known
    for wrong in ({"best_scale": "much"}, {"usable_scales": [1]}, {"usable_scales": ["a", "b"]}):
        with pytest.raises(ValueError):
            AdapterMetadata.from_json(json.dumps({"rank": 4, "alpha": 4.0, **wrong}))


def test_a_published_file_keeps_its_tensors_and_the_page_presets_its_scale(dog, tmp_path):
    file = shutil.copy(dog[0] / "dog.kohya.safetensors", tmp_path / "dog.safetensors")
    tensors = read_tensors(file)[0]
    assert summary_of(file).scale == 1
    assert note_scale(file, 0.6, (0.4, 0.8)) and note_scale(file, 0.7, (0.4, 0.8))
    after, header = read_tensors(file)
    facts = AdapterMetadata.from_json(header["moslora"])
    assert facts.best_scale == 0.7 and facts.usable_scales == (0.4, 0.8)
    assert summary_of(file).scale == 0.7 and "best at scale 0.7" in summary_of(file).sentence()
    assert list(after) == list(tensors) and all(torch.equal(after[name], tensors[name]) for name in tensors)
    assert note_scale(file, 1e9, (0.4, 0.8)) and summary_of(file).scale == 1  # beyond the slider
    foreign = save_diffusers_lora(tiny_unet(), tmp_path)
    before = foreign.read_bytes()
    assert not note_scale(foreign, 0.8, (0.6, 1.0)) and foreign.read_bytes() == before


def test_a_card_names_the_strength_once():
    card = "# dog\n\n## Use\n\ncode\n\n## Training\n\n| | |\n"
    once = with_strength(card, 0.8, (0.6, 1.0))
    assert "Scale 0.8 scored best; from 0.6 to 1 the score stays near it" in once
    assert once.replace(once[once.index("## Strength") : once.index("## Training")], "") == card
    again = with_strength(once, 1.2, (1.2, 1.2))
    assert again.count("## Strength") == 1 and "Scale 1.2 scored best. In diffusers" in again
