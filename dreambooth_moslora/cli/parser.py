"""Command-line parser whose mistakes are one line, and which reads flags of other trainers.

Flags may have underscores or hyphens.
"""

import argparse
from collections.abc import Collection, Sequence
from typing import Any, NoReturn

from dreambooth_moslora.errors import UserError
from dreambooth_moslora.importers.flags import translate_flags
from dreambooth_moslora.settings import field_facts, setting_names

DEVICE_HINT = "a GPU is used if there is one; CUDA_VISIBLE_DEVICES in the environment chooses one"
"""End of the message for a flag that names a device."""


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

    # Look for a mistyped flag.
    if name in ("device", "gpu", "gpus"):
        return f"unknown flag {flag}: {DEVICE_HINT}."
    flag_names = flag_names or {*setting_names.SETTINGS, *setting_names.ALIASES}
    nearest = setting_names.GUESSES.get(name)
    if nearest not in flag_names:
        nearest = field_facts.find_nearest_name(name.removeprefix("no_"), flag_names)
    if nearest:
        return f"unknown flag {flag}: did you mean --{setting_names.get_flag_name(nearest)}?"
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

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[override]
        """Parse arguments; those of other trainers become settings and the namespace's
        `translation`. Raises UserError."""
        translation = None
        if self.has_settings and args is not None:
            own_names = map(parse_flag_name, self._option_string_actions)
            args, translation = translate_flags(args, own_names)
        namespace, unknown = super().parse_known_args(args, namespace)
        if translation:
            namespace.translation = translation
            for name, value in translation.settings.items():
                if not hasattr(namespace, name):
                    setattr(namespace, name, value)
        return namespace, unknown

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
