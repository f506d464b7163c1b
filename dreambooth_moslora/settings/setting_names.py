"""Names of the settings: by row, by flag, in a message, and of a person's mistake."""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import Field, fields
from typing import Any

from dreambooth_moslora.errors import UserError
from dreambooth_moslora.settings import field_facts
from dreambooth_moslora.settings.setting_rows import SettingRows

SETTINGS: dict[str, Field] = {item.name: item for item in fields(SettingRows)}
GROUPS = tuple(dict.fromkeys(item.metadata["group"] for item in SETTINGS.values()))
"""The groups of the help, in their order."""
EXCLUSIONS = {name: item.metadata["excludes"] for name, item in SETTINGS.items()}
"""Setting -> settings that cannot be combined with it, and why."""


def list_settings(fact: str, value: Any = True) -> tuple[str, ...]:
    """Return the settings whose row has this value of a fact of `field_facts.FieldFacts`."""
    return tuple(name for name, item in SETTINGS.items() if item.metadata[fact] == value)


ALIASES = {
    alias: name
    for name, item in SETTINGS.items()
    for alias in f"{item.metadata['flag']} {item.metadata['also']}".split()
}
"""Further names of a setting, as a flag and in a file -> its name."""


GUESSES = {
    "steps": "max_train_steps",
    "lr": "learning_rate",
    "epochs": "num_train_epochs",
    "model": "pretrained_model_name_or_path",
    "prompt": "instance_prompt",
    "lora_rank": "rank",
    "network_dim": "rank",
    "network_alpha": "lora_alpha",
}
"""Names that people try first -> the setting that they mean."""
FLAG_PATTERN = re.compile(r"--(?P<name>\w+)(?: (?P<word>'[^']*'|[^\s,;:]+?)(?=\.?(?:[\s,;:]|$)))?")
"""Flag in a message, with the word after it."""


def list_flags(name: str) -> list[str]:
    """Return the flags of a setting, the preferred one first."""
    facts = SETTINGS[name].metadata
    names = [*facts["flag"].split(), name, *facts["also"].split()]
    return [f"--{alias}" for alias in names]


def get_flag_name(name: str) -> str:
    """Return a setting's preferred flag without hyphens; any other name is returned unchanged."""
    return SETTINGS[name].metadata["flag"] or name if name in SETTINGS else name


def check_setting_names(names: Iterable[str]) -> None:
    """Raise UserError for an unknown name, with the most similar setting."""
    for name in names:
        if name not in SETTINGS:
            alias = name.replace("-", "_")
            nearest = (ALIASES | GUESSES).get(alias)
            nearest = nearest or field_facts.find_nearest_name(alias, SETTINGS)
            advice = f": did you mean `{nearest}`?" if nearest else "; docs/settings.md lists all."
            raise UserError(f"unknown setting `{name}`{advice}")


@contextmanager
def name_arguments_in_errors() -> Iterator[None]:
    """Let UserErrors name arguments of Python in place of flags."""
    try:
        yield
    except UserError as error:
        raise UserError(format_arguments(str(error))) from error.__cause__


def format_arguments(text: str) -> str:
    """Write flags as arguments: `--captions auto` -> `captions="auto"`."""
    text = re.sub(r"`train (\S+) (\w+)`", r'`train_subject("\1", "\2")`', text)
    return FLAG_PATTERN.sub(format_argument, text)


def format_argument(flag: re.Match) -> str:
    """Write a flag, with its value if the next word is one, as an argument."""
    name, word = flag["name"], flag["word"] or ""
    setting = ALIASES.get(name, name)
    if setting not in SETTINGS and name.removeprefix("no_") in SETTINGS:
        return f"{name.removeprefix('no_')}=False{word and f' {word}'}"
    if word.startswith("'") or re.fullmatch(r"-?[\d.]+(e[+-]?\d+)?|-?inf|nan", word):
        return f"{name}={word}"

    # A message may begin with any value and a colon: `--masks sometimes: choose one of …`.
    begins = flag.start() == 0 and flag.string[flag.end() :].startswith(":")
    is_choice = setting in SETTINGS and word in SETTINGS[setting].metadata["choices"]
    if word and (begins or is_choice):
        return f'{name}="{word}"'
    return f"{name} {word}".rstrip()
