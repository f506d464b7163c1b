"""Which runs can share their steps (`training.together`): those on one base whose micro-batches have one shape."""

from dataclasses import fields

from dreambooth_moslora.core.config.train_config import TrainConfig

__all__ = ["needs_to_be_alone", "shared_settings"]

ALIKE_GROUPS = ("base model", "adapter", "memory and speed")
ALIKE = (
    *("resolution", "with_prior_preservation", "prior", "train_batch_size", "gradient_accumulation_steps"),
    "do_edm_style_training",
)
OWN = ("init_adapter", "mixer_lr_scale", "dataloader_num_workers")
"""Of the groups of ALIKE_GROUPS, and yet each run's own."""


def needs_to_be_alone(config: TrainConfig) -> str | None:
    """The flag for which no other run can share its steps, None where all can."""
    reasons = {
        "--train_text_encoder": config.train_text_encoder,
        "--train_text_encoder_ti": config.train_text_encoder_ti,
        "--use_dora": config.use_dora,
        "--lora_dropout": config.lora_dropout > 0,
        "--enable_bucket": config.enable_bucket,
        "--caching off": config.caching == "off",
        "--base_quantization int8": config.base_quantization == "int8",
        "--compile on": config.compile == "on",
        "--cache_cross_attention": config.cache_cross_attention or "cached" in (config.memory or ""),
    }
    return next((flag for flag, is_given in reasons.items() if is_given), None)


def shared_settings(config: TrainConfig) -> tuple[object, ...]:
    """The settings in which runs must be alike to share their steps."""
    found = [f.name for f in fields(config) if f.metadata["group"] in ALIKE_GROUPS and f.name not in OWN]
    return tuple(getattr(config, name) for name in (*found, *ALIKE))
