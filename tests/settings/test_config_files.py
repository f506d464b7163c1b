"""Recipe of a published file: its settings, and nothing private."""

import json
import os
from dataclasses import fields

from safetensors import safe_open

from dreambooth_moslora.settings.config_files import (
    CHANGED_RECIPE_SETTINGS,
    LAYER_SETTINGS,
    RECIPE_SETTINGS,
    build_recipe,
)
from dreambooth_moslora.settings.parsing import FIELD_TYPES
from dreambooth_moslora.settings.train_config import TrainConfig
from dreambooth_moslora.training.loop import train
from tests.helpers.tiny_training import paint_photos, tiny_config


def test_a_training_publishes_its_recipe_and_nothing_private(tiny_base, tmp_path):
    photos = paint_photos(tmp_path / "alices_photos")
    config = tiny_config(
        tiny_base,
        photos,
        tmp_path / "first",
        max_train_steps=2,
        rank_pattern=("to_q=3",),
        target_modules=("to_q", "to_k"),
        mixer="kaiming",
        snr_gamma=5.0,
        lora_alpha=2.5,
        cache_dir=str(tmp_path / "secret"),
        validation_prompt="a private prompt",
        caption_prefix="prefixed by alice",
        mask_prompt="masked by alice",
    )
    train(config)
    for name in ("pytorch_lora_weights", "first.kohya", "last/moslora_weights"):
        with safe_open(tmp_path / "first" / f"{name}.safetensors", "np") as file:
            header = json.dumps(file.metadata())
        recipe = json.loads(json.loads(header)["moslora"])["recipe"]
        assert recipe == json.loads(json.dumps(build_recipe(config)))
        for private in (str(tmp_path), "alice", "private", "secret", os.sep + "tmp"):
            assert private not in header


def test_a_recipe_holds_numbers_switches_choices_and_layers():
    items = {item.name: item for item in fields(TrainConfig)}
    checked = {"text_encoder_out_layers", "more_resolutions"}  # nothing but numbers
    for name in {*RECIPE_SETTINGS, *CHANGED_RECIPE_SETTINGS} - {*LAYER_SETTINGS} - checked:
        assert FIELD_TYPES[name][0] in (bool, int, float) or items[name].metadata["choices"], name
    assert len({*RECIPE_SETTINGS, *CHANGED_RECIPE_SETTINGS}) == len(RECIPE_SETTINGS) + len(
        CHANGED_RECIPE_SETTINGS
    )
    # A default changes no recipe.
    assert set(build_recipe(TrainConfig())) <= set(RECIPE_SETTINGS)
    assert build_recipe(TrainConfig(noise_offset=0.1)) == build_recipe(TrainConfig()) | {
        "noise_offset": 0.1
    }
    assert build_recipe(TrainConfig(target_modules=("to_q", "/home/alice", "two words")))[
        "target_modules"
    ] == ["to_q"]
