"""The command line of training: a parser made from `TrainConfig`; defaults < --like < --config file < flags.

Flags may have underscores or hyphens. A switch may be written `--flag`, `--flag false` or `--no_flag`. For a
flag of another trainer the error names the equivalent one.
"""

import argparse
import os
import sys
from collections.abc import Collection, Sequence
from dataclasses import Field, fields
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from dreambooth_moslora import __version__
from dreambooth_moslora.cli.foreign_flags import is_removed, unknown_flag_message
from dreambooth_moslora.cli.one_word import choose, leading_words
from dreambooth_moslora.core.assets import find_asset
from dreambooth_moslora.core.config.fields import GROUPS, Prompt
from dreambooth_moslora.core.config.files import load_settings
from dreambooth_moslora.core.config.like import settings_like
from dreambooth_moslora.core.config.subject_tables import SAID_BY_SUBJECTS, SubjectTable
from dreambooth_moslora.core.config.train_config import (
    FIELD_TYPES,
    TrainConfig,
    check_each,
    checked_setting,
    without_removed,
)
from dreambooth_moslora.core.errors import UserError, spelled_out
from dreambooth_moslora.training.planning.common_settings import in_lines, same_for_all

__all__ = [
    "Parser",
    "add_training_flags",
    "build_train_parser",
    "parse_train_config",
    "parse_training",
    "settings_of",
    "underscored",
]

SAID_BY_WORDS = (
    *(item.name for item in fields(SubjectTable)),
    *("dataset_name", "subjects", "leave_out", "output_dir", "hub_model_id"),
)
"""Settings of a --config file that a folder and a word on the command line replace."""
DESCRIPTION = "Teach an SDXL model one subject from a few photos, through a MoSLoRA adapter (arXiv 2406.11909)."
SCRIPT = "train_dreambooth.py"
EXAMPLE = """examples:
  {command} photos/dog dog
      a folder and a word: the program chooses and prints the rest, and any flag below overrides it
  {command} --pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0 \\
    --instance_data_dir photos/dog --instance_prompt "a photo of sks dog" --output_dir runs/dog --max_train_steps 500
  {command} --config assets/configs/quickstart.toml

Flags are those of diffusers' train_dreambooth_lora_sdxl.py, and more. Switches are undone by --no_SWITCH.
Ctrl-C finishes the step and saves; --resume_from_checkpoint latest goes on."""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises UserError for a mistake. `is_of_training`: it takes the settings of a run."""

    is_of_training = False

    def __init__(self, *args: Any, **kwargs: Any):
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(*args, **{"allow_abbrev": False, "formatter_class": formatter, **kwargs})

    def error(self, message: str) -> NoReturn:
        unknown = message.removeprefix("unrecognized arguments: ")
        word = unknown.split()[0]
        if unknown != message and (self.is_of_training or is_removed(word)):
            raise UserError(unknown_flag_message(word))
        raise UserError(f"{message}; see {self.prog} --help.")


def underscored(argv: Sequence[str]) -> list[str]:
    """`--train-batch-size=1` -> `--train_batch_size=1`; values do not change."""
    return [spelled(word) if word.startswith("--") else word for word in argv]


def spelled(flag: str) -> str:
    name, equals, value = flag.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value


def build_train_parser(prog: str = SCRIPT) -> Parser:
    """`prog` is the command that was started, for the usage and the examples."""
    command = f"python {SCRIPT}" if prog == SCRIPT else prog
    parser = Parser(prog=prog, description=DESCRIPTION, epilog=EXAMPLE.format(command=command))
    parser.add_argument("--version", action="version", version=__version__)
    about = (
        "put the run at the end of the queue beside its --output_dir and return; `queue start` or the page trains it"
    )
    parser.add_argument("--queue", action="store_true", help=about)
    add_training_flags(parser)
    return parser


def add_training_flags(parser: "Parser", hidden: Collection[str] = ()) -> None:
    """Add `--config`, `--like`, and a flag for each setting; flags that are not given are not in the result.

    `hidden` flags are not in the help; the command that uses this explains them.
    """
    parser.is_of_training = True
    parser.add_argument("--config", metavar="FILE", help="settings from a .toml or .json file; flags override them")
    about_like = "settings from a published adapter file, also kohya's; flags and --config override them"
    parser.add_argument("--like", metavar="FILE", help=about_like)
    for title in GROUPS:
        group = parser.add_argument_group(title)
        for item in fields(TrainConfig):
            if item.metadata["group"] == title:
                add_flag(group, item, is_hidden=item.name in hidden)


def add_flag(group: Any, item: Field, *, is_hidden: bool = False) -> None:
    base, _ = FIELD_TYPES[item.name]
    about = argparse.SUPPRESS if is_hidden else help_of(item)
    options: dict[str, Any] = {"dest": item.name, "default": argparse.SUPPRESS, "help": about}
    if base is bool:
        group.add_argument(f"--{item.name}", nargs="?", const=True, metavar="true|false", **options)
        options |= {"help": argparse.SUPPRESS}
        group.add_argument(f"--no_{item.name}", action="store_const", const=False, **options)
    else:
        choices = item.metadata["choices"]
        metavar = "{" + ",".join(choices) + "}" if choices else METAVARS[base]
        group.add_argument(f"--{item.name}", nargs="+" if base in (tuple, Prompt) else None, metavar=metavar, **options)


METAVARS = {int: "N", float: "X", str: "TEXT", tuple: "NAME", Prompt: "TEXT", SubjectTable: "DIR"}


def help_of(item: Field) -> str:
    default = item.default
    if item.metadata["required"]:
        note = " (required)"
    elif default is None or default is False or default == ():
        note = ""
    else:
        note = f" (default: {' '.join(default) if isinstance(default, tuple) else default})"
    return (item.metadata["help"] + note).replace("%", "%%")


def parse_train_config(argv: Sequence[str], prog: str = SCRIPT) -> TrainConfig:
    """The resolved settings of a command line. Raises UserError; SystemExit for --help and --version."""
    return parse_training(argv, prog)[0]


def parse_training(argv: Sequence[str], prog: str = SCRIPT) -> tuple[TrainConfig, bool]:
    """Like `parse_train_config`; also returns whether the run should wait in the queue. Raises UserError."""
    launcher = launcher_settings()
    given = same_for_all(lambda: given_by(argv, prog), Given.in_lines)
    settings = with_choices(given) if given.words else given.settings
    require(settings)
    return TrainConfig.from_dict(settings | launcher), given.is_queued


class Given(NamedTuple):
    """What a command line and its files say, before the words choose the other settings."""

    words: list[str]
    settings: dict[str, Any]
    has_recipe: bool
    is_queued: bool

    def in_lines(self) -> str:
        return "\n".join([*self.words, in_lines(self.settings)])


def given_by(argv: Sequence[str], prog: str) -> Given:
    """Raises UserError; SystemExit for --help and --version."""
    words, rest = leading_words(underscored(argv))
    found, unknown = build_train_parser(prog).parse_known_args(rest)
    if not words and len(unknown) == 2 and Path(find_asset(unknown[0])).is_dir():  # words after the flags
        words, unknown = unknown, []
    if unknown:
        raise UserError(unknown_flag_message(unknown[0]))
    flags = vars(found)
    is_queued = flags.pop("queue")
    settings, has_recipe = settings_of(flags, without_words=bool(words))  # words replace these, like flags
    return Given(words, settings, has_recipe, is_queued)


def settings_of(flags: dict[str, Any], *, without_words: bool = False) -> tuple[dict[str, Any], bool]:
    """The settings of parsed flags and of the files of --config and --like, and whether there is such a file.

    `without_words` drops a --config file's own subject (SAID_BY_WORDS). Raises UserError.
    """
    flags = dict(flags)
    file, like = flags.pop("config"), flags.pop("like")
    recipe = load_settings(file) if file else {}
    like_of_file = recipe.pop("like", None)
    like = like or like_of_file
    if without_words:
        recipe = {name: value for name, value in recipe.items() if name not in SAID_BY_WORDS}
    settings = overridden(recipe, flags)
    check_each(settings)
    settings = without_removed(settings)
    if like:
        taken, lines = settings_like(str(like), settings)
        settings = taken | settings
        say(lines)
    return settings, bool(file or like)


def with_choices(given: Given) -> dict[str, Any]:
    """The settings, and those chosen for a folder and a word; each choice is printed."""
    settings = {name: checked_setting(name, value) for name, value in given.settings.items()}
    choices = choose(given.words, settings, has_recipe=given.has_recipe, is_queued=given.is_queued)
    say(choices.lines)
    return choices.all


def say(lines: list[str]) -> None:
    """Print the lines on the terminal, in the first process only."""
    if os.environ.get("RANK", "0") == "0":
        for line in lines:
            print(spelled_out(line), file=sys.stderr)


def overridden(settings: dict[str, Any], flags: dict[str, Any]) -> dict[str, Any]:
    """A file's settings overridden by flags. A flag that sets the steps removes the file's settings of the
    steps; a flag that names one subject removes the file's several ones, and the reverse."""
    steps = ("max_train_steps", "exposures_per_photo")
    gone = steps if any(name in flags for name in steps) else ()
    if "subjects" in flags:
        gone += SAID_BY_SUBJECTS
    elif flags.keys() & {"instance_data_dir", "dataset_name"}:
        gone += ("subjects",)
    return {name: value for name, value in settings.items() if name not in gone} | flags


def require(settings: dict[str, Any]) -> None:
    """Raises UserError for missing settings."""
    missing = [f"--{item.name}" for item in fields(TrainConfig) if item.metadata["required"]]
    missing = [flag for flag in missing if not str(settings.get(flag[2:], "")).strip()]
    if settings.get("subjects"):
        missing = [flag for flag in missing if flag != "--instance_prompt"]
    elif not settings.get("instance_data_dir") and not settings.get("dataset_name"):
        missing.append("--instance_data_dir (or --dataset_name)")
    if missing:
        raise UserError(f"missing: {', '.join(missing)}; give it as a flag or in a --config file, or see --help.")


def launcher_settings() -> dict[str, int]:
    """The launcher's LOCAL_RANK, which overrides --local_rank. Raises UserError for a bad number."""
    said = {name: os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE") if name in os.environ}
    for name, value in said.items():
        if not value.removeprefix("-").isdecimal():
            raise UserError(f"{name}={value} in the environment: expected a whole number, as a launcher sets it.")
    rank = int(said.get("LOCAL_RANK", "-1"))
    return {"local_rank": rank} if rank != -1 else {}
