"""The flags of a training: the parser of `train`, its help, and the settings of flags and files.

A switch may be written `--flag`, `--flag false` or `--no_flag`.
"""

import argparse
import logging
from collections.abc import Collection, Mapping
from dataclasses import Field
from itertools import groupby
from typing import Any

from dreambooth_moslora import __version__
from dreambooth_moslora.cli.ignored_flags import add_ignored_flags, describe_ignored
from dreambooth_moslora.cli.parser import CommandParser
from dreambooth_moslora.cli.terminal import print_lines
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.settings import config_files, train_config
from dreambooth_moslora.settings.field_facts import COMMAND_WORDS, Prompt, Subject

logger = logging.getLogger(__name__)

DESCRIPTION = (
    "Teach SDXL or another diffusion model one subject from a few photos, by a MoSLoRA "
    "(arXiv 2406.11909)."
)
# The name under which it is called as a script
SCRIPT = "train_dreambooth.py"
EXAMPLES = """examples:
  {command} photos/dog dog
      a folder and a word: the program chooses and prints the rest, and any flag below overrides it
  {command} photos/dog dog --base stabilityai/stable-diffusion-xl-base-1.0
  {command} --config assets/configs/quickstart.toml

Flags are those of diffusers' train_dreambooth_lora_sdxl.py, and more. Switches are undone by
--no_SWITCH. Ctrl-C finishes the step and saves; --resume_from_checkpoint latest goes on."""
DAILY_FLAGS = (
    "pretrained_model_name_or_path",
    "instance_data_dir",
    "instance_prompt",
    "token",
    "masks",
    "rank",
    "resolution",
    "seed",
    "max_train_steps",
    "exposures_per_photo",
    "learning_rate",
    "memory",
    "output_dir",
    "resume_from_checkpoint",
    "dry_run",
)
"""The settings that `--help` shows."""
# Type of a setting -> what its help calls a value
METAVARS = {int: "N", float: "X", str: "TEXT", tuple: "NAME", Prompt: "TEXT", Subject: "DIR"}


def build_train_parser(prog: str = SCRIPT, hidden: Collection[str] = ()) -> CommandParser:
    """The parser of `train`'s flags; words come before them. `hidden` settings are not in the
    help."""
    parser = CommandParser(
        prog=prog,
        add_help=False,
        description=DESCRIPTION,
        epilog=EXAMPLES.format(command=f"python {SCRIPT}" if prog == SCRIPT else prog),
        usage=f"{prog} [PHOTOS WORD] [--FLAG VALUE …]",
    )

    # The short help is that of a parser which hides most settings. argparse's action `version`
    # prints any text and exits.
    if not hidden:
        short = build_train_parser(
            prog, hidden=train_config.SETTINGS.keys() - {*DAILY_FLAGS}
        ).format_help()
        about = "the flags in daily use"
        parser.add_argument("-h", "--help", action="version", version=short, help=about)
    parser.add_argument("--help_all", action="help", help="all flags")
    parser.add_argument("--version", action="version", version=__version__)
    add_training_flags(parser, hidden)
    return parser


def add_training_flags(parser: CommandParser, hidden: Collection[str] = ()) -> None:
    """Add `--config`, a flag for each setting, and other trainers' flags that have no effect.

    What is parsed has the given settings alone, and `ignored` if there are any. `hidden` settings
    are understood, but not in the help.
    """
    parser.has_settings = True
    about = "settings from a .toml or .json file; flags override them"
    parser.add_argument("--config", metavar="FILE", help=about)
    for title, rows in groupby(train_config.SETTINGS.values(), lambda item: item.metadata["group"]):
        group = parser.add_argument_group(title)
        for item in rows:
            add_flag(group, item, is_hidden=item.name in hidden)
    add_ignored_flags(parser)


def add_flag(group: Any, item: Field, *, is_hidden: bool = False) -> None:
    """Add the flag of a setting to a parser's group; a hidden one is left out of the help."""
    kind = train_config.FIELD_TYPES[item.name][0]
    facts = item.metadata
    default = item.default

    # The help; argparse takes % for a format.
    about = facts["help"]
    if not facts["required"] and default not in (None, False, ()):
        about += f" (default: {' '.join(default) if isinstance(default, tuple) else default})"
    about = argparse.SUPPRESS if is_hidden else about.replace("%", "%%")

    # A flag that is not given leaves nothing behind: a file's setting is then seen.
    names = train_config.list_flags(item.name)
    options: dict[str, Any] = {"dest": item.name, "default": argparse.SUPPRESS, "help": about}
    if kind is bool:
        group.add_argument(*names, nargs="?", const=True, metavar="true|false", **options)
        options["help"] = argparse.SUPPRESS
        group.add_argument(f"--no_{item.name}", action="store_const", const=False, **options)
        return
    choices_shown = "{" + ",".join(facts["choices"]) + "}"
    group.add_argument(
        *names,
        nargs="+" if kind in (tuple, Prompt) else None,
        metavar=choices_shown if facts["choices"] else METAVARS[kind],
        **options,
    )


def resolve_settings(
    flags: Mapping[str, Any], *, without_words: bool = False
) -> tuple[dict[str, Any], bool]:
    """The settings of flags and --config, and whether there is such a file. Flags that are ignored
    are named on standard error. Raises UserError.

    flags: as parsed
    without_words: leave out what the file says of its subject, which words on the command line name
    """
    flags = dict(flags)
    file = flags.pop("config")
    print_lines(describe_ignored(flags.pop("ignored", [])))

    # A flag may replace another setting of the file, such as the photos by their other source. A
    # switch that is turned off replaces none.
    given = {
        name
        for name, value in flags.items()
        if train_config.parse_setting(name, value) is not False
    }
    if without_words:
        given.add(COMMAND_WORDS)
    settings = {}
    for name, value in (config_files.load_settings(file) if file else {}).items():
        item = train_config.SETTINGS.get(name)
        if item is None or not given.intersection(item.metadata["yields_to"]):
            settings[name] = value
        elif name == "subjects":
            logger.warning("note: the subjects in %s are left out, as others are given", file)
    return train_config.check_values(settings | flags), bool(file)


def require_settings(settings: Mapping[str, Any]) -> None:
    """Raises UserError for missing settings. An empty prompt is one, which captions may stand in
    for."""
    needed = ["pretrained_model_name_or_path"]
    if not settings.get("subjects"):
        needed += ["instance_prompt", "instance_data_dir"]
    missing = [f"--{train_config.get_flag_name(name)}" for name in needed if name not in settings]
    if missing:
        flags = ", ".join(missing)
        raise UserError(
            f"missing: {flags}; give it as a flag or in a --config file, or see --help."
        )
