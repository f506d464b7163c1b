"""Flags of other trainers on the command line, translated by the same tables as their files."""

from collections.abc import Iterable, Sequence
from typing import Any

from dreambooth_moslora.errors import UserError
from dreambooth_moslora.importers import diffusers, kohya
from dreambooth_moslora.importers.rows import Row, Translation, list_rows

COMMAND_SIGNATURE = frozenset(("network_module", "network_dim", "dataset_config"))
"""Flags that show a command of sd-scripts or musubi-tuner, whose defaults apply then. So does
`train_data_dir` without a flag that only diffusers' script of text to image has."""
KOHYA_ROWS: dict[str, Row] = dict(list_rows(kohya.TABLE))
FLAG_ROWS: dict[str, Row] = KOHYA_ROWS | dict(list_rows(diffusers.TABLE))
SWITCHES = kohya.SWITCHES | diffusers.SWITCHES
LISTS = kohya.LISTS | diffusers.LISTS
DIFFUSERS_NAMES = {name for name, _ in list_rows(diffusers.TABLE)} - KOHYA_ROWS.keys()
DIFFUSERS_NAMES |= {"center_crop", "random_flip", "rank", "validation_prompt"}


def translate_flags(
    arguments: Sequence[str], own_names: Iterable[str]
) -> tuple[list[str], Translation | None]:
    """Return the arguments without other trainers' flags, and the translation of these flags; None
    if there are none.

    arguments: a command line whose flags are spelled with underscores
    own_names: flags of the command without hyphens

    Raises UserError for a flag without its value, and for a file that cannot be read.
    """
    # All flags of a command of sd-scripts are its own; of any other, those that are not ours.
    names = {split_flag(argument)[0] for argument in arguments if argument.startswith("--")}
    is_kohya = bool(names & COMMAND_SIGNATURE)
    is_kohya |= "train_data_dir" in names and not names & DIFFUSERS_NAMES
    foreign_names = KOHYA_ROWS.keys() if is_kohya else FLAG_ROWS.keys() - set(own_names)

    # Take them out with their values.
    own_arguments: list[str] = []
    values: dict[str, Any] = {}
    remaining = list(arguments)
    while remaining:
        argument = remaining.pop(0)
        name, value = split_flag(argument)
        if not argument.startswith("--") or name not in foreign_names:
            own_arguments.append(argument)
        elif value is not None or name in SWITCHES:
            values[name] = True if value is None else value
        else:
            texts = []
            while remaining and not remaining[0].startswith("--"):
                texts.append(remaining.pop(0))
                if name not in LISTS:
                    break
            if not texts:
                raise UserError(f"--{name}: expected 1 argument.")
            values[name] = texts if len(texts) > 1 else texts[0]
    if not values:
        return own_arguments, None
    if is_kohya:
        return own_arguments, kohya.KOHYA.translate_config(values)
    translation = Translation("other trainers")
    translation.translate_values({"": FLAG_ROWS}, values)
    return own_arguments, translation


def split_flag(argument: str) -> tuple[str, str | None]:
    """Return the name and the value of `--seed=1`; None for a flag without one."""
    name, equals, value = argument.removeprefix("--").partition("=")
    return name, value if equals else None
