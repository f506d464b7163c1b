"""Rules between settings: contradictions, remarks before a run, and missing packages.

Rules of one setting, such as when it has no effect, are in its row of the table.
"""

from collections.abc import Callable
from dataclasses import fields
from importlib import metadata
from typing import Any

from dreambooth_moslora.errors import UserError
from dreambooth_moslora.settings import (
    field_facts,
    lr_schedules,
    optimizers,
    subjects,
)

Config = Any
"""Stands for `settings.train_config.TrainConfig`, which imports this file."""


REMARKS: dict[str, Callable[[Config], object]] = {
    (
        "--optimizer {optimizer} works best with --lr_scheduler "
        f"{' or '.join(lr_schedules.CONSTANT_SCHEDULES)}"
    ): lambda run: (
        optimizers.get_optimizer_kind(run).averages
        and run.lr_scheduler not in lr_schedules.CONSTANT_SCHEDULES
    ),
    "{optimizer} needs --learning_rate near 1.0": lambda run: (
        optimizers.get_optimizer_kind(run).finds_rate and run.learning_rate <= 0.1
    ),
    (
        "--instance_prompt is empty: photos without captions are learnt without words, so no word "
        "will ask for the subject"
    ): lambda run: not run.instance_prompt.strip() and not run.subjects,
    (
        "--enable_xformers_memory_efficient_attention: PyTorch's own attention needs as little "
        "memory and is used"
    ): lambda run: run.enable_xformers_memory_efficient_attention,
}
"""Sentence, with the run's values in braces -> whether it applies to a run."""


def list_remarks(config: Config) -> list[str]:
    """Return a line for each setting without effect, and for settings that do not work well
    together."""
    remarks = []
    for item in fields(config):
        if not format_flag(config, item.name):
            continue
        for condition, applies in item.metadata["idle"]:
            if applies(config):
                remarks.append(f"--{item.name} has no effect {condition.format_map(vars(config))}")
    for line, applies in REMARKS.items():
        if applies(config):
            remarks.append(line.format_map(vars(config)))
    return remarks


def format_flag(config: Config, name: str) -> str:
    """Return the flag that gives a setting its current value; "" for its default."""
    value = getattr(config, name)
    row = config.__dataclass_fields__[name]
    if value in (row.default, ""):
        return ""
    if value is False:
        return f"--no_{name}"
    return f"--{name} {value}" if row.metadata["choices"] else f"--{name}"


def list_exclusions(name: str, config: Config) -> list[tuple[str, str]]:
    """Return the active flags that exclude a setting, each with the reason."""
    exclusions = config.__dataclass_fields__[name].metadata["excludes"]
    flags = [(format_flag(config, excluded), why) for excluded, why in exclusions.items()]
    return [(flag, why) for flag, why in flags if flag]


def check_combinations(config: Config) -> None:
    """Raise UserError for the first settings that contradict each other."""
    # Sides of crops: the autoencoder makes them eight times smaller.
    if config.resolution % 8:
        lower = config.resolution // 8 * 8
        raise UserError(
            f"--resolution {config.resolution}: must be a multiple of 8, such as {lower or 8}."
        )
    for side in config.more_resolutions:
        if not (side.isdecimal() and 8 <= int(side) < config.resolution and int(side) % 8 == 0):
            raise UserError(
                f"--more_resolutions {side}: must be a multiple of 8 below --resolution "
                f"{config.resolution}."
            )
    step = config.bucket_reso_steps or 8
    if config.enable_bucket and (step % 8 or step > config.resolution):
        raise UserError(
            f"--bucket_reso_steps {step}: must be a multiple of 8, and at most the resolution."
        )

    # Several subjects, and the prompt of a class that is preserved.
    if config.subjects:
        subjects.check_subjects(config)
    elif config.with_prior_preservation and not config.class_prompt:
        raise UserError(
            '--with_prior_preservation needs --class_prompt, such as "a photo of a dog".'
        )

    # Settings that exclude each other.
    for item in fields(config):
        flag = format_flag(config, item.name)
        for excluded_flag, why in list_exclusions(item.name, config) if flag else []:
            raise UserError(f"{flag} and {excluded_flag}: {why}; give one of them.")

    # A streamed block is fetched again when it is recomputed.
    if config.stream_blocks and not config.gradient_checkpointing:
        raise UserError("--stream_blocks needs --gradient_checkpointing.")

    # Some optimizers have one learning rate for all parameters.
    kind = optimizers.get_optimizer_kind(config)
    learns_mixer = config.mixer != "none" and config.train_mixer
    if kind.one_rate and learns_mixer and config.mixer_lr_scale != 1.0:
        raise UserError(
            f"--optimizer {config.optimizer} takes one learning rate for all: leave "
            "--mixer_lr_scale at 1."
        )

    # An adapter to begin with is converted by the inverse of the mixer.
    if config.init_adapter and config.mixer == "butterfly":
        raise UserError("--init_adapter: the butterfly mixer has no inverse; give another --mixer.")

    # Names of layers.
    for name in ("rank_pattern", "alpha_pattern"):
        for text in getattr(config, name):
            field_facts.parse_pattern(name, text)
    if not config.target_modules:
        raise UserError("--target_modules is empty: name at least one projection, such as to_q.")


def find_package_version(name: str) -> str | None:
    """Return the version of an installed package; None without it."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def require_packages(config: Config) -> None:
    """Raise UserError for the first flag whose package is missing: a run would fail late, or not
    log."""
    for item in fields(config):
        value = getattr(config, item.name)
        facts = item.metadata
        package = facts["packages"].get(value) if facts["packages"] else None
        if package is None or find_package_version(package) is not None:
            continue
        # A setting without effect needs nothing.
        is_idle = any(applies(config) for _, applies in facts["idle"])
        if not is_idle:
            flag = f"--{item.name}" if value is True else f"--{item.name} {value}"
            raise UserError(f"{flag} needs {package}: pip install {package}.")
