"""What a published file tells of the settings that shaped its weights, beside `core.config.recipe`.

recipe     numbers, switches and choices
public     prompts and a variant that a recipe in `assets/configs` has too
withheld   names, without values, of the other settings: prompts, file names, folders

A file whose reader can conclude all of it from the recipe and the trigger words has neither `public` nor `withheld`.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from dreambooth_moslora.adapters.files.metadata import PUBLIC, AdapterMetadata
from dreambooth_moslora.core.assets import assets_folder
from dreambooth_moslora.core.config.files import load_settings
from dreambooth_moslora.core.config.recipe import recipe_of
from dreambooth_moslora.core.config.subject_tables import SAID_BY_SUBJECTS
from dreambooth_moslora.core.config.train_config import TrainConfig, checked_setting
from dreambooth_moslora.core.toy import is_toy

__all__ = ["RESUMED", "UNTOLD", "concluded", "told_by", "with_told"]

KNOWN_BASES = ("toy", "stabilityai/stable-diffusion-xl-base-1.0")
"""Bases that are loaded when a file names them. A file from a stranger may name any folder or hub id, so the
user must name others."""
RESUMED = "resume_from_checkpoint"
"""Stands in `withheld` for a run that was resumed with other settings than it began with: no flag repeats that."""
Shapes = Callable[[TrainConfig], bool]
DEFAULTS = TrainConfig()


def draws_class_images(config: TrainConfig) -> bool:
    return config.with_prior_preservation and config.prior == "class_images"


UNTOLD: dict[str, Shapes] = (
    dict.fromkeys(
        (
            *("instance_prompt", "subjects", "dataset_name", "leave_out", "caption_prefix", "caption_suffix"),
            *("init_adapter", "pretrained_vae_model_name_or_path"),
        ),
        lambda config: True,
    )
    | dict.fromkeys(("revision", "variant"), lambda config: not is_toy(config.pretrained_model_name_or_path))
    | dict.fromkeys(("dataset_config_name", "image_column", "caption_column"), lambda config: bool(config.dataset_name))
    | dict.fromkeys(("caption_model",), lambda config: config.captions == "auto")
    | dict.fromkeys(("mask_model", "mask_prompt"), lambda config: config.masks == "auto")
    | dict.fromkeys(("class_prompt",), lambda config: config.with_prior_preservation)
    | dict.fromkeys(("prior_prompts",), lambda config: config.with_prior_preservation and config.prior == "adapter_off")
    | dict.fromkeys(("class_data_dir", "sample_batch_size", "prior_generation_precision"), draws_class_images)
    | dict.fromkeys(("initializer_concept",), lambda config: config.train_text_encoder_ti)
    | dict.fromkeys(("basis",), lambda config: config.basis is not None)
)
"""Each setting that can shape the weights and that a recipe may lack -> whether it does so in a run of these settings.
Base, class word and the words of new tokens are not among them: other entries of the header have them."""


def with_told(config: TrainConfig, facts: AdapterMetadata) -> AdapterMetadata:
    """The `facts` of a run, whose words and base are set, with the recipe and all else that they tell of `config`."""
    facts = replace(facts, recipe=recipe_of(config))
    known = concluded(facts)
    by_subject = SAID_BY_SUBJECTS if config.subjects else ()
    asked = [name for name, shapes in UNTOLD.items() if shapes(config) and name not in by_subject]
    asked = [name for name in asked if name not in facts.recipe]
    open_ = [name for name in asked if getattr(config, name) != known.get(name, getattr(DEFAULTS, name))]
    public = {name: getattr(config, name) for name in open_ if name in PUBLIC and is_public(config, name)}
    return replace(facts, public=public, withheld=tuple(name for name in open_ if name not in public))


def concluded(facts: AdapterMetadata) -> dict[str, Any]:
    """The settings that a reader takes from the header beside the recipe, converted."""
    found: dict[str, Any] = {"class_word": facts.class_word or None}
    if facts.base_id in KNOWN_BASES and not Path(facts.base_id).exists():
        found["pretrained_model_name_or_path"] = facts.base_id
    if len(facts.trigger_words) == 1:
        found["instance_prompt"] = f"a photo of a {facts.trigger_words[0]}"
    if facts.class_word and facts.recipe.get("with_prior_preservation"):
        found["class_prompt"] = f"a photo of a {facts.class_word}"
    if len(facts.tokens) == 1:
        found["token_abstraction"] = facts.tokens[0]["word"]
    alike = [one for one in shipped_recipes() if recipe_of(one) == facts.recipe]
    found |= {name: getattr(one, name) for one in alike for name in PUBLIC}
    return found | {name: checked_setting(name, value) for name, value in facts.public.items()}


def told_by(facts: AdapterMetadata) -> bool:
    """Whether the file surely lists its private settings. Files of earlier versions, and those of runs that have
    nothing to list, do not."""
    return bool(facts.public or facts.withheld or facts.step or facts.processes)


def is_public(config: TrainConfig, name: str) -> bool:
    values = [getattr(one, name) for one in (DEFAULTS, *shipped_recipes())]
    return getattr(config, name) in values


@lru_cache(maxsize=1)
def shipped_recipes() -> tuple[TrainConfig, ...]:
    """The recipes in `assets/configs`."""
    files = sorted((assets_folder() / "configs").glob("*.toml"))
    return tuple(TrainConfig.from_dict(load_settings(file)) for file in files)
