"""The recipe of a run: the settings that an adapter file publishes.

They are numbers, switches, choices and names of layers. Paths, prompts and words are left out, and settings
of the machine that do not shape the weights.
"""

import re
from collections.abc import Mapping
from typing import Any

from dreambooth_moslora.core.config.train_config import REMOVED, TrainConfig
from dreambooth_moslora.core.config.training_settings import SVD
from dreambooth_moslora.core.errors import UserError, one_line

__all__ = ["RECIPE", "checked_recipe", "recipe_of"]

LAYERS = ("target_modules", "rank_pattern", "alpha_pattern")
RECIPE = (
    *("shuffle_caption", "keep_tokens", "caption_dropout", "repeats", "resolution"),
    *("enable_bucket", "bucket_reso_steps", "center_crop", "random_flip", "crops_per_photo"),
    *("crop_zoom", "image_interpolation_mode", "alpha", "unmasked_weight", "masks"),
    *("with_prior_preservation", "prior", "num_class_images", "prior_loss_weight", "rank"),
    *("lora_alpha", "use_rslora", "lora_dropout", "use_dora", "mixer", "train_mixer"),
    *("mixer_lr_scale", "train_text_encoder", *LAYERS, "seed", "train_batch_size"),
    *("gradient_accumulation_steps", "num_train_epochs", "max_train_steps"),
    *("exposures_per_photo", "learning_rate", "text_encoder_lr", "scale_lr", "lr_scheduler"),
    *("lr_warmup_steps", "lr_num_cycles", "lr_power", "snr_gamma", "timestep_bias_strategy"),
    *("timestep_bias_multiplier", "timestep_bias_portion", "do_edm_style_training"),
    *("max_grad_norm", "optimizer", "use_8bit_adam", "adam_beta1", "adam_beta2", "adam_epsilon"),
    *("adam_weight_decay", "adam_weight_decay_text_encoder", "prodigy_beta3", "prodigy_decouple"),
    *("prodigy_use_bias_correction", "prodigy_safeguard_warmup", "mixed_precision"),
    *("base_quantization", "gradient_checkpointing"),
)
"""Names of settings. Add a new one here, or below, only if it cannot hold text of the user's."""
TOLD_IF_CHANGED = (
    *("noise_offset", "loss_type", "huber_c", "huber_schedule", "debiased_estimation_loss"),
    *("use_ema", "ema_decay", "captions", "cache_cross_attention"),
    *("train_text_encoder_ti", "train_text_encoder_ti_frac", "num_new_tokens_per_abstraction"),
    *("basis", "instance_prompt_share"),
    *("sample_batch_size", "prior_generation_precision", "caching", "allow_tf32", "compile"),
)
"""Settings that are published only if they differ from the default, so that other files keep their bytes."""
DEFAULTS = TrainConfig().to_dict()
MOST_LETTERS = 50_000
"""Of a list of layers: every layer of SDXL by name takes less."""
LAYER = re.compile(r"[A-Za-z0-9_.*\[\]?-]{1,100}([=:][0-9.e+]{1,20})?")


def recipe_of(config: TrainConfig) -> dict[str, Any]:
    """JSON-ready values of the settings in RECIPE that are set."""
    settings = config.to_dict()
    for name in LAYERS:
        settings[name] = [text for text in settings[name] if LAYER.fullmatch(text)]
    if settings["basis"] != SVD:  # a file's name is the user's
        settings["basis"] = None
    if settings["caching"] == "disk":  # the bytes are those of "memory"
        settings["caching"] = DEFAULTS["caching"]
    changed = [name for name in TOLD_IF_CHANGED if settings[name] != DEFAULTS[name]]
    return {name: settings[name] for name in (*RECIPE, *changed) if settings[name] is not None}


def checked_recipe(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The valid settings that are in RECIPE, converted; and an error line for each of the others."""
    taken, wrong = {}, []
    for name, value in values.items():
        try:
            taken[name] = checked_alone(name, value)
        except UserError as error:
            wrong.append(one_line(str(error).rstrip("."), 100))
    return taken, wrong


def checked_alone(name: str, value: Any) -> Any:
    """The converted value. Raises UserError for a name that is not in RECIPE, and for an invalid value."""
    if name in REMOVED:
        raise UserError(f"`{name}`: {REMOVED[name]}")
    if name not in (*RECIPE, *TOLD_IF_CHANGED):
        raise UserError(f"`{name:.40}` is not a setting of a recipe")
    if name in LAYERS and len(str(value)) > MOST_LETTERS:
        raise UserError(f"--{name} names too many layers")
    found = getattr(TrainConfig(class_prompt="a class", **{name: value}), name)
    if name == "basis" and found not in (None, SVD):
        raise UserError("--basis names a file")
    if name in LAYERS and not all(LAYER.fullmatch(text) for text in found):
        raise UserError(f"--{name} names no layers")
    return found
