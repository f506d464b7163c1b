"""Command-line parser whose mistakes are one line, and flags of other trainers.

Flags may have underscores or hyphens. For a flag of another trainer the error names the
replacement.
"""

import argparse
from collections.abc import Collection, Sequence
from typing import Any, NoReturn

from dreambooth_moslora.errors import UserError
from dreambooth_moslora.settings import field_facts, train_config

FOREIGN_NAMES = {
    # earlier versions of diffusers' script, and its siblings
    "train_text_encoder_ti token_abstraction placeholder_token": (
        "not supported: no new tokens are learnt"
    ),
    "timestep_bias_strategy": "not supported: all noise levels are equally likely",
    "system_prompt": "Lumina 2's own sentence is put before each prompt; leave it out",
    "complex_human_instruction": "nothing is put before Sana's prompts; leave it out",
    # its scripts for other models
    "bnb_quantization_config_path": "use --base_quantization nf4, or int8",
    "blocks_to_swap": "use --stream_blocks",
    "do_fp8_training": "not supported: --base_quantization int8 is nearest",
    "skip_final_inference": "use --num_validation_images 0, which generates no samples at all",
    "final_validation_prompt": (
        "use --validation_prompt; the last samples are generated at the end of the run"
    ),
    "optimizer_type": (
        f"use --optimizer {{{','.join(train_config.SETTINGS['optimizer'].metadata['choices'])}}}"
    ),
    "optimizer_args": "use --adam_beta1, --adam_weight_decay and their like, one flag each",
    "optimizer_schedulefree_wrapper": "use --optimizer AdamWScheduleFree",
    "concepts_list concept_list": "use --subjects, or [[subjects]] tables in a --config file",
    # kohya-ss/sd-scripts
    "network_module": "there is one kind of adapter; --mixer none makes it a plain LoRA",
    "network_args": (
        "use --rank, --lora_alpha, --rank_pattern, --alpha_pattern, --target_modules, --use_dora"
    ),
    "train_data_dir": (
        "use --instance_data_dir, or --subjects where each folder in it is another subject"
    ),
    "dataset_name dataset_config_name image_column caption_column": (
        "use --instance_data_dir, a folder of photos with their captions beside them"
    ),
    "dataset_config": "use --subjects, or [[subjects]] tables in a --config file",
    "reg_data_dir": "use --class_data_dir with --with_prior_preservation",
    "output_name": "the files are named by --output_dir",
    "caption_strategy": (
        "captions are name.txt, metadata.jsonl or the instance prompt; --captions auto makes them"
    ),
    "caption_extension": "captions are the lines of name.txt beside each photo",
    "aspect_ratio_buckets": "use --enable_bucket, which crops each photo in its own shape",
    "bucket_no_upscale": "not supported: a small photo is enlarged to the area of --resolution",
    "torch_compile dynamo_backend": "use --compile on",
    "use_ema ema_decay ema_max_decay": (
        "use --optimizer AdamWScheduleFree, which publishes an average of its steps"
    ),
    "v_parameterization": "read from the base's scheduler; leave it out",
}
"""Flags of other trainers -> what to give instead."""


FLAG_GUESSES = {
    "steps": "max_train_steps",
    "lr": "learning_rate",
    "epochs": "num_train_epochs",
    "model": "base",
    "prompt": "instance_prompt",
}
"""Names that people try first -> the setting that they mean."""
DEVICE_HINT = "a GPU is used if there is one; CUDA_VISIBLE_DEVICES in the environment chooses one"
"""End of the message for a flag that names a device."""


FOREIGN_FLAGS = {
    **{flag: f"use --{name}" for flag, name in train_config.map_aliases("elsewhere").items()},
    **{flag: instead for flags, instead in FOREIGN_NAMES.items() for flag in flags.split()},
}
"""Each flag of other trainers -> what to give instead: FOREIGN_NAMES, and the names that our
settings have elsewhere."""


def parse_flag_name(flag: str) -> str:
    """Return the name of a flag: `--seed=1` -> `seed`."""
    return flag.partition("=")[0].lstrip("-")


def describe_unknown_flag(word: str, flag_names: Collection[str] = ()) -> str:
    """Return what to give in place of an argument that is not understood. `flag_names`: the
    command's flags, without their hyphens; by default those of a training."""
    if not word.startswith("-"):
        return f"`{word}` belongs to no flag: a prompt of several words goes in quotes."
    flag = word.partition("=")[0]
    name = parse_flag_name(word)

    # Look for another trainer's flag, then for a mistyped one of ours.
    if name in FOREIGN_FLAGS and not flag_names:
        return f"{flag}: {FOREIGN_FLAGS[name]}."
    if name in ("device", "gpu", "gpus"):
        return f"unknown flag {flag}: {DEVICE_HINT}."
    flag_names = flag_names or {*train_config.SETTINGS, *train_config.ALIASES}
    nearest = FLAG_GUESSES.get(name)
    if nearest not in flag_names:
        nearest = field_facts.find_nearest_name(name.removeprefix("no_"), flag_names)
    if nearest:
        return f"unknown flag {flag}: did you mean --{train_config.get_flag_name(nearest)}?"
    return f"unknown flag {flag}; see --help."


class CommandParser(argparse.ArgumentParser):
    """ArgumentParser that raises UserError for a mistake. `has_settings`: it accepts the settings
    of a run."""

    has_settings = False

    def __init__(self, *args: Any, **kwargs: Any):
        # An abbreviation would change its meaning once a new flag begins with the same letters.
        kwargs.setdefault("allow_abbrev", False)
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(*args, **kwargs)

    def error(self, message: str) -> NoReturn:
        """Raise UserError, in place of argparse's usage of many lines and exit."""
        unknown = message.removeprefix("unrecognized arguments: ")
        word = next(iter(unknown.split()), "")
        if unknown != message and (self.has_settings or word.startswith("-")):
            flags = [] if self.has_settings else self._option_string_actions
            raise UserError(describe_unknown_flag(word, list(map(parse_flag_name, flags))))
        raise UserError(f"{message}; see {self.prog} --help.")


def normalize_flags(argv: Sequence[str]) -> list[str]:
    """Replace hyphens in the names of flags: `--train-batch-size=1` -> `--train_batch_size=1`."""
    arguments = []
    for argument in argv:
        if argument.startswith("--"):
            name, equals, value = argument[2:].partition("=")
            argument = f"--{name.replace('-', '_')}{equals}{value}"
        arguments.append(argument)
    return arguments
