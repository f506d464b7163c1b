"""The command line of training: a parser made from `TrainConfig`, and `defaults < --config file < flags`.

Flags are spelled with underscores or hyphens. A switch may be written `--flag`, `--flag false` or `--no_flag`.
"""

import argparse
import os
from collections.abc import Sequence
from dataclasses import Field, fields
from typing import Any, NoReturn

from dreambooth_moslora import __version__
from dreambooth_moslora.config import FIELD_TYPES, TrainConfig, check_each
from dreambooth_moslora.config_fields import GROUPS, Prompt, nearest
from dreambooth_moslora.config_files import load_settings
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.foreign_flags import FOREIGN_FLAGS

__all__ = ["Parser", "build_train_parser", "parse_train_config", "underscored"]

DESCRIPTION = "Teach an SDXL model one subject from a few photos, through a MoSLoRA adapter (arXiv 2406.11909)."
EXAMPLE = """example:
  python train_dreambooth.py --pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0 \\
    --instance_data_dir photos/dog --instance_prompt "a photo of sks dog" --output_dir runs/dog --max_train_steps 500
  python train_dreambooth.py --config assets/configs/quickstart.toml

Flags are those of diffusers' train_dreambooth_lora_sdxl.py, and more. Switches are undone by --no_SWITCH.
Ctrl-C finishes the step and saves; --resume_from_checkpoint latest goes on."""


class Parser(argparse.ArgumentParser):
    """argparse, with a person's mistakes as UserError."""

    def __init__(self, *args: Any, **kwargs: Any):
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(*args, **{"allow_abbrev": False, "formatter_class": formatter, **kwargs})

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help.")


def underscored(argv: Sequence[str]) -> list[str]:
    """`--train-batch-size=1` -> `--train_batch_size=1`; values stay as they are."""
    return [spelled(word) if word.startswith("--") else word for word in argv]


def spelled(flag: str) -> str:
    name, equals, value = flag.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value


def build_train_parser() -> Parser:
    parser = Parser(prog="train_dreambooth.py", description=DESCRIPTION, epilog=EXAMPLE)
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("--config", metavar="FILE", help="settings from a .toml or .json file; flags override them")
    for title in GROUPS:
        group = parser.add_argument_group(title)
        for item in fields(TrainConfig):
            if item.metadata["group"] == title:
                add_flag(group, item)
    return parser


def add_flag(group: Any, item: Field) -> None:
    base, _ = FIELD_TYPES[item.name]
    options: dict[str, Any] = {"dest": item.name, "default": argparse.SUPPRESS, "help": help_of(item)}
    if base is bool:
        group.add_argument(f"--{item.name}", nargs="?", const=True, metavar="true|false", **options)
        options |= {"help": argparse.SUPPRESS}
        group.add_argument(f"--no_{item.name}", action="store_const", const=False, **options)
    else:
        choices = item.metadata["choices"]
        metavar = "{" + ",".join(choices) + "}" if choices else METAVARS[base]
        group.add_argument(f"--{item.name}", nargs="+" if base in (tuple, Prompt) else None, metavar=metavar, **options)


METAVARS = {int: "N", float: "X", str: "TEXT", tuple: "NAME", Prompt: "TEXT"}


def help_of(item: Field) -> str:
    default = item.default
    if item.metadata["required"]:
        note = " (required)"
    elif default is None or default is False:
        note = ""
    else:
        note = f" (default: {' '.join(default) if isinstance(default, tuple) else default})"
    return (item.metadata["help"] + note).replace("%", "%%")


def parse_train_config(argv: Sequence[str]) -> TrainConfig:
    """The resolved settings of a command line. Raises UserError; exits by itself for --help and --version."""
    given, unknown = build_train_parser().parse_known_args(underscored(argv))
    if unknown:
        raise UserError(complaint(unknown[0]))
    flags = vars(given)
    file = flags.pop("config")
    settings = (load_settings(file) if file else {}) | flags
    check_each(settings)
    require(settings)
    return TrainConfig.from_dict(settings | launcher_settings())


def require(settings: dict[str, Any]) -> None:
    missing = [f"--{item.name}" for item in fields(TrainConfig) if item.metadata["required"]]
    missing = [flag for flag in missing if not str(settings.get(flag[2:], "")).strip()]
    if not settings.get("instance_data_dir") and not settings.get("dataset_name"):
        missing.append("--instance_data_dir (or --dataset_name)")
    if missing:
        raise UserError(f"missing: {', '.join(missing)}; give it as a flag or in a --config file, or see --help.")


def launcher_settings() -> dict[str, int]:
    """The launcher's own word on the rank wins, as in diffusers' script."""
    said = {name: os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE") if name in os.environ}
    for name, value in said.items():
        if not value.removeprefix("-").isdecimal():
            raise UserError(f"{name}={value} in the environment: expected a whole number, as a launcher sets it.")
    rank = int(said.get("LOCAL_RANK", "-1"))
    return {"local_rank": rank} if rank != -1 else {}


def complaint(word: str) -> str:
    """What to say about an argument that no flag takes."""
    if not word.startswith("-"):
        return f"`{word}` belongs to no flag: a prompt of several words goes in quotes."
    flag = word.partition("=")[0]
    name = flag.lstrip("-")
    if name in FOREIGN_FLAGS:
        return f"{flag}: {FOREIGN_FLAGS[name]}."
    close = nearest(name.removeprefix("no_"), FIELD_TYPES)
    return f"unknown flag {flag}" + (f": did you mean --{close}?" if close else "; see --help.")
