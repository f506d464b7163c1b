"""Rules between settings, each a sentence that names the flags: what is refused, and what is remarked before a run.

What one row of the table says of its own setting, such as when it has no effect, is not repeated here.
"""

from collections.abc import Callable
from dataclasses import fields
from typing import Any

from dreambooth_moslora.core import UserError, is_toy
from dreambooth_moslora.settings.fields import parse_pattern
from dreambooth_moslora.settings.optimizers import SCHEDULE_FREE, optimizer_of
from dreambooth_moslora.settings.subjects import check_subjects

Config = Any
"""Stands for `settings.table.TrainConfig`, which imports this file."""

REMARKS: dict[str, Callable[[Config], object]] = {
    f"--optimizer {SCHEDULE_FREE} works best with --lr_scheduler constant or constant_with_warmup": (
        lambda run: run.optimizer == SCHEDULE_FREE and not run.lr_scheduler.startswith("constant")
    ),
    "Prodigy needs --learning_rate near 1.0": lambda run: run.optimizer == "Prodigy" and run.learning_rate <= 0.1,
    "--enable_xformers_memory_efficient_attention: PyTorch's own attention needs as little memory and is used": (
        lambda run: run.enable_xformers_memory_efficient_attention
    ),
    "--mask_prompt has no effect with the embedded base's own net; --mask_model names a CLIPSeg": (
        lambda run: (
            run.masks == "auto" and run.mask_prompt and not run.mask_model and is_toy(run.pretrained_model_name_or_path)
        )
    ),
}
"""Sentence -> whether it is said of a run."""


def remarks(config: Config) -> list[str]:
    """A line for each setting that the other settings make ineffective, and for other settings that go badly
    together."""
    found = [
        f"--{item.name} has no effect {words.format_map(vars(config))}"
        for item in fields(config)
        for words, applies in item.metadata["idle"]
        if getattr(config, item.name) not in (item.default, "") and applies(config)
    ]
    return found + [line for line, applies in REMARKS.items() if applies(config)]


def check_together(config: Config) -> None:
    """Raises UserError for the first settings that contradict each other."""
    if config.resolution % 8:
        lower = config.resolution // 8 * 8
        raise UserError(f"--resolution {config.resolution}: must be a multiple of 8, such as {lower or 8}.")
    if (config.bucket_reso_steps or 8) % 8:
        raise UserError(f"--bucket_reso_steps {config.bucket_reso_steps}: must be a multiple of 8, such as 64.")
    if config.enable_bucket and (step := config.bucket_reso_steps or 8) > config.resolution:
        raise UserError(f"--bucket_reso_steps {step}: must be at most --resolution {config.resolution}.")
    if config.instance_data_dir and config.dataset_name:
        raise UserError("--instance_data_dir and --dataset_name: give one of them, not both.")
    if config.subjects:
        check_subjects(config)
    elif config.with_prior_preservation and not config.class_prompt:
        raise UserError('--with_prior_preservation needs --class_prompt, such as "a photo of a dog".')
    for flag in weighting_flags(config) if config.do_edm_style_training else ():
        raise UserError(f"{flag} and --do_edm_style_training: EDM weighs noise levels itself; give one of them.")
    if config.snr_gamma is not None and config.debiased_estimation_loss:
        raise UserError("--snr_gamma and --debiased_estimation_loss: each weighs noise levels; give one of them.")
    if config.exposures_per_photo and config.max_train_steps:
        raise UserError("--exposures_per_photo and --max_train_steps: each sets the steps; give one of them.")
    if config.early_stopping and not config.evaluate_steps:
        raise UserError("--early_stopping needs --evaluate_steps: it stops by the scores.")
    kind = optimizer_of(config)
    if kind.one_rate and config.mixer != "none" and config.train_mixer and config.mixer_lr_scale != 1.0:
        raise UserError(f"--optimizer {config.optimizer} takes one learning rate for all: leave --mixer_lr_scale at 1.")
    if kind.averages and (config.use_ema or not config.adam_beta1):
        flag = "--use_ema" if config.use_ema else "--adam_beta1 0"
        raise UserError(f"--optimizer {config.optimizer} averages its steps itself: leave out {flag}.")
    if config.train_text_encoder and config.train_text_encoder_ti:
        raise UserError("--train_text_encoder and --train_text_encoder_ti: train adapters or new tokens; give one.")
    if kind.averages and config.train_text_encoder_ti:
        raise UserError(f"--optimizer {config.optimizer} averages the adapter alone: give AdamW with new tokens.")
    for flag, why in needs_live_projections(config) if config.cache_cross_attention else ():
        raise UserError(f"--cache_cross_attention and {flag}: {why}; give one of them.")
    if config.init_adapter and config.mixer == "butterfly":
        raise UserError("--init_adapter: the butterfly mixer has no inverse; give another --mixer.")
    for flag, why in excluded_by_basis(config) if config.basis else ():
        raise UserError(f"--basis and {flag}: {why}; give one of them.")
    for name in ("rank_pattern", "alpha_pattern"):
        for text in getattr(config, name):
            parse_pattern(name, text)
    if not config.target_modules:
        raise UserError("--target_modules is empty: name at least one projection, such as to_q.")


def needs_live_projections(config: Config) -> list[tuple[str, str]]:
    """The given flags that make it impossible to compute cross-attention's products with a prompt once, and the
    reasons."""
    changes = "the text of a prompt changes from step to step"
    given = {
        ("--train_text_encoder", changes): config.train_text_encoder,
        ("--train_text_encoder_ti", changes): config.train_text_encoder_ti,
        ("--use_dora", "DoRA reads the weights"): config.use_dora,
        (f"--base_quantization {config.base_quantization}", "it quantises these weights"): config.base_quantization
        != "none",
    }
    return [reason for reason, is_given in given.items() if is_given]


def excluded_by_basis(config: Config) -> list[tuple[str, str]]:
    """The given flags that a frozen basis excludes, and the reasons."""
    given = {
        ("--init_adapter", "each sets A and B"): config.init_adapter,
        ("--use_dora", "the mixer alone is trained"): config.use_dora,
        ("--train_text_encoder", "a basis is the UNet's"): config.train_text_encoder,
        ("--train_text_encoder_ti", "a basis is the UNet's"): config.train_text_encoder_ti,
        (f"--mixer {config.mixer}", "on a basis the mixer starts at zero"): config.mixer != "orthogonal",
        ("--no_train_mixer", "nothing would be trained"): not config.train_mixer,
    }
    return [reason for reason, is_given in given.items() if is_given]


def weighting_flags(config: Config) -> list[str]:
    """The given flags that weigh errors of noise or velocity, which EDM's errors of latents exclude."""
    given = {
        "--snr_gamma": config.snr_gamma is not None,
        "--debiased_estimation_loss": config.debiased_estimation_loss,
        f"--loss_type {config.loss_type}": config.loss_type != "l2",
    }
    return [flag for flag, is_given in given.items() if is_given]
