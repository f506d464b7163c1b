"""Rows of the tables that translate another trainer's keys into settings.

A table is {title: {keys: row}}; a string of several keys, separated by spaces, shares a row. Nested
keys are joined by dots: `train.lr`. The pages `docs/from_*.md` are made from the same rows.
"""

import shlex
import shutil
import textwrap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from dreambooth_moslora.errors import UserError
from dreambooth_moslora.settings import parsing, setting_names

UNSET_VALUES = (None, False, 0, "", (), [], {}, "none", "None", "NONE")
"""Values with which an option of another trainer is turned off."""


DEFAULT_SOURCE = "default"
"""Source of a setting that the other trainer's file does not name."""


class UnsupportedValueError(ValueError):
    """A converter's refusal of a value; its text is the reason."""


@dataclass(frozen=True)
class Translated:
    """Key with a counterpart.

    setting: the counterpart; None if it has the key's name, or the last part of a nested one
    convert: returns the setting's value, or a dict of several settings, or None for no setting;
        raises UnsupportedValueError, or TypeError or ValueError for a value of another type
    remark: for the docs
    """

    setting: str | None = None
    convert: Callable[[Any], Any] | None = None
    remark: str = ""


@dataclass(frozen=True)
class Ignored:
    """Key without effect on what is learnt, and what is done instead."""

    reason: str


@dataclass(frozen=True)
class Unsupported:
    """Key that would change the training and has no counterpart, unless it has a `harmless`
    value."""

    reason: str
    harmless: tuple[Any, ...] = ()


Row = Translated | Ignored | Unsupported
Table = Mapping[str, Mapping[str, Row]]


@dataclass
class Translation:
    """Settings from another trainer, and what became of its keys.

    settings: by our names
    sources: setting -> the keys and values that it comes from, as text
    ignored: reason -> keys and values without effect, as text
    unsupported, unknown: texts of keys and reasons
    """

    trainer: str
    settings: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    ignored: dict[str, list[str]] = field(default_factory=dict)
    unsupported: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)

    def set_values(self, settings: Mapping[str, Any], source: str) -> None:
        """Store settings with their source. A later value replaces an earlier one."""
        for name, value in settings.items():
            self.settings[name] = value
            self.sources[name] = source

    def add_defaults(self, defaults: Mapping[str, Any]) -> None:
        """Fill in the trainer's own defaults where its file is silent."""
        for name, value in defaults.items():
            if name not in self.settings:
                self.set_values({name: value}, DEFAULT_SOURCE)

    def is_default(self, name: str) -> bool:
        """Return whether a setting need not be written: it has our default, and the other trainer's
        file does not name it or turns it off."""
        value = self.settings[name]
        is_silent = self.sources.get(name, DEFAULT_SOURCE) == DEFAULT_SOURCE
        is_off = value in (None, False)
        return value == setting_names.SETTINGS[name].default and (is_silent or is_off)

    def translate_values(self, table: Table, values: Mapping[str, Any]) -> None:
        """Translate the values of a flat mapping by the rows of a table."""
        rows = dict(list_rows(table))
        for key, value in values.items():
            row = rows.get(key)
            if row is None:
                add_text(self.unknown, format_pair(key, ""))
            else:
                self._translate_value(key, value, row)

    def ignore(self, pair: str, reason: str) -> None:
        """Report a key and its value as without effect."""
        add_text(self.ignored.setdefault(reason, []), pair)

    def _translate_value(self, key: str, value: Any, row: Row) -> None:
        text = format_pair(key, value)
        if isinstance(row, Ignored):
            if value not in UNSET_VALUES:
                self.ignore(text, row.reason)
        elif isinstance(row, Unsupported):
            if value not in (*UNSET_VALUES, *row.harmless):
                add_text(self.unsupported, f"{text}: {row.reason}")
        elif value is not None and value != "":
            try:
                converted = row.convert(value) if row.convert else value
                if not isinstance(converted, Mapping):
                    setting = row.setting or key.rpartition(".")[2]
                    converted = {} if converted is None else {setting: converted}
                self.set_values(parsing.parse_settings(converted), text)
            except (UnsupportedValueError, UserError) as error:
                add_text(self.unsupported, f"{text}: {error}".rstrip("."))
            except (TypeError, ValueError, OverflowError):
                add_text(self.unsupported, f"{text}: a value of another kind is expected")


def add_text(texts: list[str], text: str) -> None:
    """Add a text once."""
    if text not in texts:
        texts.append(text)


def list_rows(table: Table) -> Iterator[tuple[str, Row]]:
    """Return each key of a table with its row."""
    for rows in table.values():
        for keys, row in rows.items():
            for key in keys.split():
                yield key, row


def format_pair(key: str, value: Any) -> str:
    """Return `key value` for a message, on one line and not longer than 80 characters."""
    text = " ".join(f"{key} {value}".split())
    return text if len(text) <= 80 else f"{text[:79]}…"


def format_report(translation: Translation) -> list[str]:
    """Return the lines that say what became of the keys, as wide as the terminal. Settings with our
    default are left out. Flags of which none has an effect are one line."""
    if translation.ignored and not (translation.settings or translation.unknown):
        reasons = [f"{', '.join(pairs)} ({why})" for why, pairs in translation.ignored.items()]
        return [f"Ignored, as they have no effect here: {'; '.join(reasons)}."]
    lines = [f"Translated from {translation.trainer}:"]
    default_texts = []
    for name, value in translation.settings.items():
        source = translation.sources.get(name, "")
        if translation.is_default(name):
            continue
        text = format_setting(name, value)
        if source == DEFAULT_SOURCE:
            default_texts.append(text)
        else:
            lines += wrap_line(f"  {text}  <- {source}" if source else f"  {text}")

    # What became no setting
    if default_texts:
        lines += wrap_line(f"  defaults of {translation.trainer}: {', '.join(default_texts)}")
    if translation.ignored:
        lines.append("  no effect here:")
    for reason, pairs in translation.ignored.items():
        lines += wrap_line(f"    {reason}: {', '.join(pairs)}")
    if translation.unknown:
        lines += wrap_line(f"  unknown here and left out: {', '.join(translation.unknown)}")
    if translation.settings.get("mixer") == "none":
        lines.append("  This trains a plain LoRA, as there; --mixer orthogonal trains a MoSLoRA.")
    return lines


def wrap_line(line: str) -> list[str]:
    """Return the lines of a line that is too long for the terminal."""
    width = shutil.get_terminal_size((100, 24)).columns
    return textwrap.wrap(line, width, subsequent_indent="      ", break_on_hyphens=False)


def format_setting(name: str, value: Any) -> str:
    """Return a setting as a flag with its value, as it is written in a command."""
    flag = setting_names.get_flag_name(name)
    if isinstance(value, bool):
        return f"--{flag}" if value else f"--no_{flag}"
    if name == "subjects":
        value = [subject["instance_data_dir"] for subject in value]
    values = value if isinstance(value, (list, tuple)) else [value]
    return " ".join([f"--{flag}", *(shlex.quote(str(item)) for item in values)])


def require_supported(translation: Translation) -> None:
    """Raise UserError with all keys that would change the training and have no counterpart."""
    if len(translation.unsupported) > 1:
        lines = "\n  ".join(translation.unsupported)
        raise UserError(f"not supported here; remove or change:\n  {lines}")
    if translation.unsupported:
        raise UserError(f"not supported here: {translation.unsupported[0]}.")
