"""Which runs can share their steps (`training.together`): runs on one base with micro-batches of one shape."""

from dataclasses import fields

from dreambooth_moslora.core.config.train_config import TrainConfig

__all__ = ["needs_to_be_alone", "shared_settings"]

ALIKE_GROUPS = ("base model", "adapter", "memory and speed")
ALIKE = (
    *("resolution", "with_prior_preservation", "prior", "train_batch_size", "gradient_accumulation_steps"),
    "do_edm_style_training",
)
OWN = ("init_adapter", "mixer_lr_scale", "dataloader_num_workers")
"""Settings in ALIKE_GROUPS that may nevertheless differ between runs."""


def needs_to_be_alone(config: TrainConfig) -> str | None:
    """The flag that keeps a run from sharing steps with any other; None when there is none."""
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
    """The values of the settings in which runs must agree to share their steps."""
    found = [f.name for f in fields(config) if f.metadata["group"] in ALIKE_GROUPS and f.name not in OWN]
    return tuple(getattr(config, name) for name in (*found, *ALIKE))
