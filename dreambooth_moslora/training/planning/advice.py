"""Advice before a run: settings without effect, too few exposures, too little room on the disk, and DoRA elsewhere.

A dry run, a real run and the page show it. `checks` holds what forbids a run.
"""

import os
import shutil
from dataclasses import fields
from pathlib import Path

from dreambooth_moslora.adapters.files.dora_readers import DORA_NOTE
from dreambooth_moslora.core.config.train_config import TrainConfig
from dreambooth_moslora.core.config.training_settings import SCHEDULE_FREE
from dreambooth_moslora.core.toy import is_toy
from dreambooth_moslora.photos.folder import photo_report
from dreambooth_moslora.photos.photo import counts_of
from dreambooth_moslora.training.planning.checks import nearest_existing
from dreambooth_moslora.training.planning.estimate import GIB, Estimate, estimate, size_of_base
from dreambooth_moslora.training.planning.step_plan import FEW_EXPOSURES, StepPlan, plan_steps

__all__ = [
    "DEFAULTS",
    "advice",
    "advice_before_run",
    "differs",
    "exposure_advice",
    "free_disk_gib",
    "settings_without_effect",
]

PIVOTAL = (
    *("train_text_encoder_ti_frac", "token_abstraction", "num_new_tokens_per_abstraction", "initializer_concept"),
)
DEFAULTS = {item.name: item.default for item in fields(TrainConfig)}


def advice(config: TrainConfig, cost: Estimate, plan: StepPlan) -> list[str]:
    """Lines of advice; none of them forbids the run."""
    dora = [DORA_NOTE] * config.use_dora
    return [*settings_without_effect(config), *exposure_advice(plan), *disk_advice(config, cost), *dora]


def advice_before_run(config: TrainConfig, base: Path | None) -> list[str]:
    """The `advice` for a run that begins now; `base` is the base's folder.

    Raises UserError when no photo can be used.
    """
    photos = photo_report(config).photos
    plan = plan_steps(config, counts_of(photos), int(os.environ.get("WORLD_SIZE", "1")))
    size = size_of_base(base, config.target_modules, config.variant)
    return advice(config, estimate(config, size, plan.total_steps), plan)


def exposure_advice(plan: StepPlan) -> list[str]:
    if plan.exposures_a_photo >= FEW_EXPOSURES:
        return []
    seen = f"each photo is seen about {plan.exposures_a_photo:.0f} times"
    return [f"{seen}, and a subject needs 100 or more: set --exposures_per_photo or --max_train_steps"]


def disk_advice(config: TrainConfig, cost: Estimate) -> list[str]:
    free = free_disk_gib(config)
    if free >= cost.disk_gib:
        return []
    return [f"the disk has too little room: the run writes {cost.disk_gib:.2f} GiB, {free:.1f} GiB are free"]


def free_disk_gib(config: TrainConfig) -> float:
    """GiB free on the disk of the run folder, which need not exist yet."""
    return shutil.disk_usage(nearest_existing(Path(config.output_dir))).free / GIB


def settings_without_effect(config: TrainConfig) -> list[str]:
    """A line for each setting that the other settings make ineffective."""
    base = config.pretrained_model_name_or_path
    found = {
        "--class_data_dir and --class_prompt have no effect without --with_prior_preservation": (
            (config.class_data_dir or config.class_prompt) and not config.with_prior_preservation
        ),
        "--ema_decay has no effect without --use_ema": differs(config, "ema_decay") and not config.use_ema,
        "--huber_c and --huber_schedule have no effect without --loss_type huber or smooth_l1": (
            (differs(config, "huber_c") or differs(config, "huber_schedule")) and config.loss_type == "l2"
        ),
        "--prior has no effect without --with_prior_preservation": (
            differs(config, "prior") and not config.with_prior_preservation
        ),
        "--prior_prompts has no effect without --with_prior_preservation --prior adapter_off": (
            config.prior_prompts and not (config.with_prior_preservation and config.prior == "adapter_off")
        ),
        "--class_data_dir has no effect with --prior adapter_off, which needs no images": (
            config.class_data_dir and config.with_prior_preservation and config.prior == "adapter_off"
        ),
        f"--use_8bit_adam has no effect with --optimizer {config.optimizer}": (
            config.use_8bit_adam and config.optimizer != "AdamW"
        ),
        f"--optimizer {SCHEDULE_FREE} works best with --lr_scheduler constant or constant_with_warmup": (
            config.optimizer == SCHEDULE_FREE and not config.lr_scheduler.startswith("constant")
        ),
        "--timestep_bias_multiplier has no effect without --timestep_bias_strategy": (
            differs(config, "timestep_bias_multiplier") and config.timestep_bias_strategy == "none"
        ),
        "--text_encoder_lr has no effect without --train_text_encoder or --train_text_encoder_ti": (
            differs(config, "text_encoder_lr") and not config.keeps_text_encoders
        ),
        **{
            f"--{name} has no effect without --train_text_encoder_ti": (
                differs(config, name) and not config.train_text_encoder_ti
            )
            for name in PIVOTAL
        },
        "--num_new_tokens_per_abstraction has no effect with --initializer_concept, whose words say how many": (
            differs(config, "num_new_tokens_per_abstraction") and config.initializer_concept
        ),
        "Prodigy needs --learning_rate near 1.0": config.optimizer == "Prodigy" and config.learning_rate <= 0.1,
        "--bucket_reso_steps has no effect without --enable_bucket": (
            config.bucket_reso_steps and not config.enable_bucket
        ),
        "--keep_tokens has no effect without --shuffle_caption": config.keep_tokens and not config.shuffle_caption,
        f"--lr_warmup_steps has no effect with --lr_scheduler {config.lr_scheduler}": (
            config.lr_scheduler == "constant" and config.lr_warmup_steps and differs(config, "lr_warmup_steps")
        ),
        "--enable_xformers_memory_efficient_attention: PyTorch's own attention needs as little memory and is used": (
            config.enable_xformers_memory_efficient_attention
        ),
        "--dataloader_num_workers has no effect while photos are cached": (
            config.dataloader_num_workers > 0 and config.caching != "off"
        ),
        "--train_mixer and --mixer_lr_scale have no effect with --mixer none": (
            config.mixer == "none" and differs(config, "mixer_lr_scale")
        ),
        "--caption_model has no effect without --captions auto": config.caption_model and config.captions != "auto",
        "--mask_model and --mask_prompt have no effect without --masks auto": (
            (config.mask_model or config.mask_prompt) and config.masks != "auto"
        ),
        "--mask_prompt has no effect with the embedded base's own net; --mask_model names a CLIPSeg": (
            config.masks == "auto" and config.mask_prompt and not config.mask_model and is_toy(base)
        ),
        "--num_train_epochs has no effect with --max_train_steps or --exposures_per_photo": (
            (config.max_train_steps or config.exposures_per_photo) and differs(config, "num_train_epochs")
        ),
    }
    return [text for text, applies in found.items() if applies]


def differs(config: TrainConfig, name: str) -> bool:
    """Whether a setting differs from its default."""
    return getattr(config, name) != DEFAULTS[name]
