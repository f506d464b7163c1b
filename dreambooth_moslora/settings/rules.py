"""Rules between settings, each a sentence that names the flags: what is refused, and what is
remarked before a run; and whether the packages that they need are installed.

What one row of the table says of its own setting, such as when it has no effect, is not repeated
here.
"""

from collections.abc import Callable
from dataclasses import fields
from importlib import metadata
from typing import Any

from dreambooth_moslora.errors import UserError
from dreambooth_moslora.settings import optimizer_kinds, rows, subjects, toys

Config = Any  # Stands for `settings.table.TrainConfig`, which imports this file.

REMARKS: dict[str, Callable[[Config], object]] = {
    f"--optimizer {optimizer_kinds.SCHEDULE_FREE} works best with --lr_scheduler constant or constant_with_warmup": (
        lambda run: (
            run.optimizer == optimizer_kinds.SCHEDULE_FREE
            and not run.lr_scheduler.startswith("constant")
        )
    ),
    "Prodigy needs --learning_rate near 1.0": lambda run: (
        run.optimizer == "Prodigy" and run.learning_rate <= 0.1
    ),
    "--enable_xformers_memory_efficient_attention: PyTorch's own attention needs as little memory and is used": (
        lambda run: run.enable_xformers_memory_efficient_attention
    ),
    "--mask_prompt has no effect with the embedded base's own net; --mask_model names a CLIPSeg": (
        lambda run: (
            run.masks == "auto"
            and run.mask_prompt
            and not run.mask_model
            and toys.is_toy(run.pretrained_model_name_or_path)
        )
    ),
}
"""Sentence -> whether it is said of a run."""


EDM_WEIGHS = "EDM weighs noise levels itself"
TEXT_CHANGES = "the text of a prompt changes from step to step"
ONE_PASS = "a text's gradient comes from one pass"
EXCLUDED: dict[str, dict[str, str]] = {
    "snr_gamma": {
        "do_edm_style_training": EDM_WEIGHS,
        "debiased_estimation_loss": "each weighs noise levels",
    },
    "debiased_estimation_loss": {"do_edm_style_training": EDM_WEIGHS},
    "loss_type": {"do_edm_style_training": EDM_WEIGHS},
    "exposures_per_photo": {"max_train_steps": "each sets the steps"},
    "cache_cross_attention": {
        "train_text_encoder": TEXT_CHANGES,
        "train_text_encoder_ti": TEXT_CHANGES,
        "use_dora": "DoRA reads the weights",
        "base_quantization": "it quantises these weights",
    },
    "images_at_once": {name: ONE_PASS for name in ("train_text_encoder", "train_text_encoder_ti")},
}
"""Setting -> settings that a run cannot change beside it, and why."""


def remarks(config: Config) -> list[str]:
    """A line for each setting that the others make ineffective, and for settings that go badly
    together."""
    found = [
        f"--{item.name} has no effect {words.format_map(vars(config))}"
        for item in fields(config)
        for words, applies in item.metadata["idle"]
        if given_flag(config, item.name) and applies(config)
    ]
    return found + [line for line, applies in REMARKS.items() if applies(config)]


def given_flag(config: Config, name: str) -> str:
    """The flag that gives a setting the value that it has; empty for its default."""
    value, row = getattr(config, name), config.__dataclass_fields__[name]
    if value in (row.default, ""):
        return ""
    if value is False:
        return f"--no_{name}"
    return f"--{name} {value}" if row.metadata["choices"] else f"--{name}"


def excluded_by(name: str, config: Config) -> list[tuple[str, str]]:
    return [
        (flag, why) for other, why in EXCLUDED[name].items() if (flag := given_flag(config, other))
    ]


def weighting_flags(config: Config) -> list[str]:
    """The given flags that weigh errors of noise or velocity, which EDM's errors of latents
    exclude."""
    weighting = [name for name, others in EXCLUDED.items() if "do_edm_style_training" in others]
    return [flag for name in weighting if (flag := given_flag(config, name))]


def check_together(config: Config) -> None:
    """Raises UserError for the first settings that contradict each other."""
    if config.resolution % 8:
        lower = config.resolution // 8 * 8
        raise UserError(
            f"--resolution {config.resolution}: must be a multiple of 8, such as {lower or 8}."
        )
    if (config.bucket_reso_steps or 8) % 8:
        raise UserError(
            f"--bucket_reso_steps {config.bucket_reso_steps}: must be a multiple of 8, such as 64."
        )
    if config.enable_bucket and (step := config.bucket_reso_steps or 8) > config.resolution:
        raise UserError(
            f"--bucket_reso_steps {step}: must be at most --resolution {config.resolution}."
        )
    if config.instance_data_dir and config.dataset_name:
        raise UserError("--instance_data_dir and --dataset_name: give one of them, not both.")
    if config.subjects:
        subjects.check_subjects(config)
    elif config.with_prior_preservation and not config.class_prompt:
        raise UserError(
            '--with_prior_preservation needs --class_prompt, such as "a photo of a dog".'
        )
    for name in EXCLUDED:
        for other, why in excluded_by(name, config) if (flag := given_flag(config, name)) else ():
            raise UserError(f"{flag} and {other}: {why}; give one of them.")
    if config.early_stopping and not config.evaluate_steps:
        raise UserError("--early_stopping needs --evaluate_steps: it stops by the scores.")
    kind = optimizer_kinds.optimizer_of(config)
    if (
        kind.one_rate
        and config.mixer != "none"
        and config.train_mixer
        and config.mixer_lr_scale != 1.0
    ):
        raise UserError(
            f"--optimizer {config.optimizer} takes one learning rate for all: leave --mixer_lr_scale at 1."
        )
    if kind.averages and (config.use_ema or not config.adam_beta1):
        flag = "--use_ema" if config.use_ema else "--adam_beta1 0"
        raise UserError(
            f"--optimizer {config.optimizer} averages its steps itself: leave out {flag}."
        )
    if config.train_text_encoder and config.train_text_encoder_ti:
        raise UserError(
            "--train_text_encoder and --train_text_encoder_ti: train adapters or new tokens; give one."
        )
    if kind.averages and config.train_text_encoder_ti:
        raise UserError(
            f"--optimizer {config.optimizer} averages the adapter alone: give AdamW with new tokens."
        )
    if config.init_adapter and config.mixer == "butterfly":
        raise UserError("--init_adapter: the butterfly mixer has no inverse; give another --mixer.")
    if config.init_adapter and config.mixer == "kronecker":
        raise UserError(
            "--init_adapter: LoKr's A and B are tied, a file's are not; give another --mixer."
        )
    for name in ("rank_pattern", "alpha_pattern"):
        for text in getattr(config, name):
            rows.parse_pattern(name, text)
    if wrong := next(
        (layer for layer in config.text_encoder_out_layers if not rows.NUMBER.fullmatch(layer)), ""
    ):
        raise UserError(
            f"--text_encoder_out_layers {wrong}: expected numbers of layers, such as 9 18 27."
        )
    if not config.target_modules:
        raise UserError("--target_modules is empty: name at least one projection, such as to_q.")


def version_of(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def require_packages(config: Config) -> None:
    """Raises UserError for the first flag whose package is missing, as a run would fail late, or
    not log."""
    for item in fields(config):
        value, facts = getattr(config, item.name), item.metadata
        package = facts["packages"].get(value) if facts["packages"] else None
        if (
            package
            and version_of(package) is None
            and not any(applies(config) for _, applies in facts["idle"])
        ):
            flag = f"--{item.name}" if value is True else f"--{item.name} {value}"
            raise UserError(f"{flag} needs {package}: pip install {package}.")
