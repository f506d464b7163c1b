"""The recipes for cards of several sizes fit them, by the estimate that `--dry_run` prints."""

from pathlib import Path

import pytest

from dreambooth_moslora.plan.memory import RECIPES, BaseSize, estimate
from dreambooth_moslora.settings.sources import load_settings
from dreambooth_moslora.settings.table import TrainConfig

CONFIGS = Path(__file__).parents[2] / "assets" / "configs"
SUBJECT = {"instance_data_dir": ".", "instance_prompt": "a photo of sks dog"}
CLASS = {"with_prior_preservation": True, "class_prompt": "a photo of a dog"}


def peak_gib(gb: int, **changes) -> float:
    config = TrainConfig.from_dict(load_settings(CONFIGS / f"sdxl_{gb}gb.toml") | SUBJECT | changes)
    return estimate(config, BaseSize(), 400).peak_gib


@pytest.mark.parametrize("gb", RECIPES)
def test_a_recipe_fits_its_card_at_sdxls_own_size(gb):
    """A desktop and what the allocator loses take a tenth. The 16 GB recipe recomputes to keep the class."""
    settings = load_settings(CONFIGS / f"sdxl_{gb}gb.toml")
    assert (settings["resolution"], settings["mixed_precision"], settings["variant"]) == (1024, "bf16", "fp16")
    assert not settings.get("use_8bit_adam")
    assert peak_gib(gb) <= 0.9 * gb
    assert peak_gib(gb, **CLASS, **({"gradient_checkpointing": True} if gb == 16 else {})) <= 0.9 * gb


def test_there_is_a_recipe_for_each_card_that_a_refusal_can_name():
    assert {path.name for path in CONFIGS.glob("sdxl_*gb.toml")} == {f"sdxl_{gb}gb.toml" for gb in RECIPES}
