"""How a setting is described, converted and checked; `TrainConfig` is written with these functions."""

import difflib
from collections.abc import Iterable
from dataclasses import Field, field, fields
from functools import partial
from pathlib import Path
from types import UnionType
from typing import Any, NewType, get_args, get_type_hints

from dreambooth_moslora.core.config.subject_tables import SubjectTable, to_tables
from dreambooth_moslora.core.errors import UserError
from dreambooth_moslora.core.numbers import is_number

__all__ = [
    "GROUPS",
    "FieldType",
    "Prompt",
    "check_limits",
    "check_number",
    "convert",
    "field_types",
    "grouped",
    "nearest",
    "option",
]

GROUPS = (
    "base model",
    "photos",
    "prior preservation",
    "adapter",
    "training",
    "optimizer",
    "memory and speed",
    "samples and evaluation",
    "run folder",
    "hub",
)

MOST = 10**9
"""Upper bound of integers without a bound of their own: larger ones are typing errors."""

Prompt = NewType("Prompt", str)
"""Text that may hold commas. A list of prompts is not split at commas; a list of names is."""
FieldType = tuple[Any, bool]
"""(bool, int, float, str, tuple for names, Prompt or SubjectTable for several of them; whether None is allowed)."""


def option(
    default: Any,
    help: str,
    *,
    group: str,
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
    below: float | None = None,
    choices: tuple[str, ...] = (),
    required: bool = False,
    secret: bool = False,
) -> Any:
    """A dataclass field with its help, bounds (low <= value <= high, above < value < below) and choices.

    A `required` setting must be given as a flag or in a file. A `secret` one is never written to a file.
    """
    bounds = {"low": low, "above": above, "high": high, "below": below}
    facts = {"help": help, "group": group, "bounds": bounds, "choices": choices}
    return field(default=default, metadata={**facts, "required": required, "secret": secret})


def grouped(group: str) -> partial:
    """`option` for the fields in one group of the help."""
    if group not in GROUPS:
        raise KeyError(group)
    return partial(option, group=group)


def field_types(owner: type) -> dict[str, FieldType]:
    """The type of each field of a dataclass, by name."""
    hints = get_type_hints(owner)
    return {item.name: field_type(hints[item.name]) for item in fields(owner)}


def field_type(hint: Any) -> FieldType:
    kinds = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    kind = next(k for k in kinds if k is not type(None))
    if kind not in (bool, int, float, str):
        kind = next((item for item in (Prompt, SubjectTable) if item in get_args(kind)), tuple)
    return kind, type(None) in kinds


def convert(name: str, value: Any, kind: FieldType) -> Any:
    """A value from Python, TOML, JSON or the command line, converted to the field's type. Raises UserError."""
    base, optional = kind
    if value is None and optional:
        return None
    converted = CONVERTERS[base](value)
    if converted is None:
        raise UserError(f"--{name} {value!r}: {NO_TEXT if is_undecodable(value) else f'expected {EXPECTED[base]}'}.")
    return converted


def to_bool(value: Any) -> bool | None:
    words = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}
    return value if isinstance(value, bool) else words.get(value.lower()) if isinstance(value, str) else None


def to_int(value: Any) -> int | None:
    if isinstance(value, bool):
        return None
    try:
        number = float(value)
        return int(value) if isinstance(value, int) else int(number) if number.is_integer() else None
    except (TypeError, ValueError, OverflowError):
        return None


def to_float(value: Any) -> float | None:
    try:
        return None if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def to_str(value: Any) -> str | None:
    return str(value) if isinstance(value, (str, Path)) and is_text(str(value)) else None


def is_undecodable(value: Any) -> bool:
    return isinstance(value, (str, Path)) and not is_text(str(value))


def is_text(value: str) -> bool:
    """False for NUL and for undecodable bytes: they cannot be written into the run's files."""
    return "\0" not in value and value == value.encode("utf-8", "replace").decode()


def to_prompts(value: Any) -> tuple[str, ...] | None:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, (list, tuple)) or not all(to_str(text) is not None for text in texts):
        return None
    return tuple(text.strip() for text in texts if text.strip())


def to_words(value: Any) -> tuple[str, ...] | None:
    texts = to_prompts(value)
    return None if texts is None else to_prompts(",".join(texts).split(","))


CONVERTERS = {bool: to_bool, int: to_int, float: to_float, str: to_str, tuple: to_words, Prompt: to_prompts} | {
    SubjectTable: to_tables
}
NO_TEXT = "not valid UTF-8, or with a NUL, so that no file of the run can hold it; write or rename it in UTF-8"
EXPECTED = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    tuple: "a list of names, separated by commas",
    Prompt: "a list of prompts",
    SubjectTable: "a folder of folders, a JSON file, or [[subjects]] tables",
}


def check_limits(item: Field, value: Any) -> None:
    """Raises UserError with the wrong number and the bound it breaks."""
    facts = item.metadata
    if value is None or value == item.default:
        return
    if facts["choices"] and value not in facts["choices"]:
        raise UserError(f"--{item.name} {value}: choose one of {', '.join(facts['choices'])}.")
    if is_number(value):
        check_number(item.name, value, **facts["bounds"])


def check_number(
    name: str,
    value: float,
    *,
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
    below: float | None = None,
) -> None:
    """Raises UserError, which begins with `--name`, for a number that is not finite or breaks a bound."""
    if value != value or value in (float("inf"), float("-inf")):
        raise UserError(f"--{name} {value}: must be a finite number.")
    if low is not None and value < low:
        raise UserError(f"--{name} {value:g}: must be at least {low:g}.")
    if above is not None and value <= above:
        raise UserError(f"--{name} {value:g}: must be more than {above:g}.")
    if high is None and isinstance(value, int):
        high = MOST
    if high is not None and value > high:
        raise UserError(f"--{name} {value:g}: must be at most {high:g}.")
    if below is not None and value >= below:
        raise UserError(f"--{name} {value:g}: must be less than {below:g}.")


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that the user probably meant."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    containing = sorted((k for k in known if len(name) > 3 and k.startswith(name)), key=len)
    return containing[0] if containing else close[0] if close else None
