"""Flags of a training: the parser of `train`, its help, and the settings of flags and files.

A switch may be written `--flag`, `--flag false` or `--no_flag`.
"""

import argparse
import logging
from collections.abc import Collection, Mapping
from dataclasses import Field
from itertools import groupby
from pathlib import Path
from typing import Any

from dreambooth_moslora import __version__
from dreambooth_moslora.base import devices
from dreambooth_moslora.cli.parser import CommandParser
from dreambooth_moslora.cli.terminal import print_lines
from dreambooth_moslora.disk.paths import find_asset
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.importers.files import load_config
from dreambooth_moslora.importers.rows import format_report, require_supported
from dreambooth_moslora.settings import parsing, setting_names
from dreambooth_moslora.settings.field_facts import COMMAND_WORDS, Prompt, Subject

logger = logging.getLogger(__name__)

DESCRIPTION = (
    "Teach SDXL or another diffusion model one subject from a few photos, by a MoSLoRA "
    "(arXiv 2406.11909)."
)
SCRIPT = "train_dreambooth.py"
"""Name of the script that runs `train`."""
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
    "evaluate_steps",
    "learning_rate",
    "memory",
    "output_dir",
    "resume_from_checkpoint",
    "dry_run",
)
"""Settings in the short help."""
RECOMMENDED_DEFAULTS = {"rank": 16, "output_dir": "runs/WORD"}
"""Defaults of `train PHOTOS WORD`, which the short help shows."""
METAVARS = {int: "N", float: "X", str: "TEXT", tuple: "NAME", Prompt: "TEXT", Subject: "DIR"}
"""Type of a setting -> placeholder of its value in the help."""


def build_train_parser(prog: str = SCRIPT, hidden: Collection[str] = ()) -> CommandParser:
    """Create the parser of `train`'s flags, which follow PHOTOS WORD. `hidden` settings are left
    out of the help."""
    parser = CommandParser(
        prog=prog,
        add_help=False,
        description=DESCRIPTION,
        epilog=EXAMPLES.format(command=f"python {SCRIPT}" if prog == SCRIPT else prog),
        usage=f"{prog} [PHOTOS WORD] [--FLAG VALUE …]",
    )

    # The short help comes from a parser that hides most settings. argparse's action `version`
    # prints any text and exits.
    if not hidden:
        rare_settings = setting_names.SETTINGS.keys() - {*DAILY_FLAGS}
        parser.add_argument(
            "-h",
            "--help",
            action="version",
            version=build_train_parser(prog, hidden=rare_settings).format_help(),
            help="the flags in daily use",
        )
    parser.add_argument("--help_all", action="help", help="all flags")
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument(
        "--verbose",
        action="store_true",
        help="with --dry_run: also the other memory plans and the changed settings",
    )
    add_training_flags(parser, hidden)
    return parser


def add_training_flags(parser: CommandParser, hidden: Collection[str] = ()) -> None:
    """Add `--config` and a flag for each setting.

    The namespace has attributes for the flags of the command line alone, and `translation` if there
    are flags of other trainers. `hidden` settings are parsed, but left out of the help.
    """
    # Flags that are no settings.
    parser.has_settings = True
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="settings from a file, also another trainer's; flags override them",
    )
    parser.add_argument(
        "--vram",
        metavar="GIB",
        type=float,
        default=argparse.SUPPRESS,
        help="plan for a GPU with this memory that is elsewhere (Nvidia, Ampere or newer), for "
        "--dry_run and `check`",
    )

    # The settings, in their groups.
    settings = setting_names.SETTINGS.values()
    for title, items in groupby(settings, lambda item: item.metadata["group"]):
        group = parser.add_argument_group(title)
        for item in items:
            add_flag(group, item, is_hidden=item.name in hidden, has_recipe=bool(hidden))


def add_flag(group: Any, item: Field, *, is_hidden: bool = False, has_recipe: bool = False) -> None:
    """Add the flag of a setting to a parser's group; a hidden one is left out of the help. With
    `has_recipe` the help shows the defaults of `train PHOTOS WORD`."""
    kind = parsing.FIELD_TYPES[item.name][0]
    facts = item.metadata
    default = item.default if not has_recipe else RECOMMENDED_DEFAULTS.get(item.name, item.default)

    # The help; argparse reads % as a format.
    help_text = facts["help"]
    if not facts["required"] and default not in (None, False, ()):
        help_text += f" (default: {' '.join(default) if isinstance(default, tuple) else default})"
    help_text = argparse.SUPPRESS if is_hidden else help_text.replace("%", "%%")

    # An absent flag sets no attribute, so that a file's setting applies.
    names = setting_names.list_flags(item.name)
    options: dict[str, Any] = {"dest": item.name, "default": argparse.SUPPRESS, "help": help_text}
    if kind is bool:
        group.add_argument(*names, nargs="?", const=True, metavar="true|false", **options)
        options["help"] = argparse.SUPPRESS
        group.add_argument(f"--no_{item.name}", action="store_const", const=False, **options)
        return
    choices = facts["choices"]
    group.add_argument(
        *names,
        nargs="+" if kind in (tuple, Prompt) else None,
        metavar=f"{{{','.join(choices)}}}" if choices else METAVARS[kind],
        **options,
    )


def resolve_settings(
    flags: Mapping[str, Any], *, without_words: bool = False
) -> tuple[dict[str, Any], bool]:
    """Merge the settings of flags and --config. Return them and whether there is such a file.

    flags: attributes of the parsed namespace
    without_words: skip the file's settings of its subject, as PHOTOS WORD names another

    Raises UserError.
    """
    flags = dict(flags)
    file = flags.pop("config")
    vram_gib = flags.pop("vram", None)
    if vram_gib is not None:
        if not 1 <= vram_gib <= 1000:
            raise UserError(f"--vram {vram_gib:g}: give a GPU's memory in GiB, such as 12.")
        devices.assumed_vram_gib.set(vram_gib)
    file_settings, file_translation = load_config(Path(find_asset(file))) if file else ({}, None)
    for translation in filter(None, (file_translation, flags.pop("translation", None))):
        require_supported(translation)
        print_lines(format_report(translation))

    # A flag may replace another setting of the file, such as the photos by another source of
    # photos. A switch that is turned off replaces none.
    flags = parsing.parse_settings(flags)
    flag_names = {name for name, value in flags.items() if value is not False}
    if without_words:
        flag_names.add(COMMAND_WORDS)
    settings = {}
    for name, value in file_settings.items():
        item = setting_names.SETTINGS.get(name)
        if item is None or not flag_names.intersection(item.metadata["yields_to"]):
            settings[name] = value
        elif name == "subjects":
            logger.warning("note: the subjects in %s are left out, as others are given", file)
    return parsing.parse_settings(settings | flags), bool(file)


def require_settings(settings: Mapping[str, Any]) -> None:
    """Raise UserError for missing settings. An empty prompt counts as a prompt: captions may
    replace it."""
    needed = ["pretrained_model_name_or_path"]
    if not settings.get("subjects"):
        needed += ["instance_prompt", "instance_data_dir"]
    missing = [f"--{setting_names.get_flag_name(name)}" for name in needed if name not in settings]
    if missing:
        raise UserError(
            f"missing: {', '.join(missing)}; give it as a flag or in a --config file, "
            "or see --help."
        )
