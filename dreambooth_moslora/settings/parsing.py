"""Conversion of settings from texts, files and arguments to the types and limits of their rows."""

import math
import operator
from collections.abc import Mapping
from dataclasses import make_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_type_hints

from dreambooth_moslora.errors import UserError
from dreambooth_moslora.settings import field_facts, subjects
from dreambooth_moslora.settings.setting_names import (
    SETTINGS,
    check_setting_names,
    list_settings,
)
from dreambooth_moslora.settings.setting_rows import SettingRows
from dreambooth_moslora.values import is_number

FieldType = tuple[Any, bool]
"""(type, whether None is allowed): tuple for names, Prompt or Subject for a tuple of them."""


def get_field_types(owner: type) -> dict[str, FieldType]:
    """Return the type of each setting, by its annotation."""
    types = {}
    for name, hint in get_type_hints(owner).items():
        # `int | None` may be None; `int` may not.
        kinds = get_args(hint) if isinstance(hint, UnionType) else (hint,)
        kind = next(k for k in kinds if k is not type(None))
        # The items of a tuple decide: text for a `tuple[Prompt, ...]` is not split at commas.
        if kind not in (bool, int, float, str):
            item = get_args(kind)[0]
            kind = tuple if item is str else item
        types[name] = kind, type(None) in kinds
    return types


FIELD_TYPES = get_field_types(SettingRows)


def get_set_values(table: Any) -> dict[str, str]:
    """Return the settings that a subject's table sets."""
    return {name: value for name, value in vars(table).items() if value is not None}


SubjectTable = make_dataclass(
    "SubjectTable",
    [(name, str | None, None) for name in list_settings("per_subject")],
    frozen=True,
    namespace={
        "__doc__": "Settings in which a subject differs from the run; None for the others.",
        "__module__": __name__,
        "to_dict": get_set_values,
    },
)


def build_subject_table(values: Any) -> Any:
    """Return a `SubjectTable` of the settings. Raises UserError for an unknown one."""
    if isinstance(values, SubjectTable):
        return values
    names = list_settings("per_subject")
    unknown = sorted(map(str, values.keys() - set(names)))
    if unknown:
        raise UserError(
            f"--subjects: a subject has no setting `{unknown[0]}`; it may have {', '.join(names)}."
        )
    return SubjectTable(**values)


def parse_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of any source by their names, each converted to its type.

    Files, flags, forms, lists and keyword arguments pass through here, and converted values pass
    unchanged. Raises UserError for an unknown name, with the most similar setting, and for a value
    of another type or beyond its limits.
    """
    values = replace_base_name(settings)
    check_setting_names(values)
    return {name: parse_setting(name, value) for name, value in values.items()}


def parse_setting(name: str, value: Any) -> Any:
    """Return the value in the setting's type, within its limits. Raises UserError."""
    item = SETTINGS[name]
    facts = item.metadata
    base, is_optional = FIELD_TYPES[name]
    if value is None and is_optional:
        return None

    # Convert the type: a flag is text, JSON and TOML have numbers.
    parsed = convert_value(base, value)
    if parsed is None:
        raise UserError(f"--{name} {value!r:.60}: expected {TYPE_DESCRIPTIONS[base]}.")
    parsed = facts["spellings"].get(str(parsed).lower(), parsed)

    # Check the limits, unless it is the default.
    if parsed != item.default:
        if facts["choices"] and parsed not in facts["choices"]:
            raise UserError(f"--{name} {parsed}: choose one of {', '.join(facts['choices'])}.")
        if is_number(parsed):
            check_number(name, parsed, facts)

    # Resolve the tables of subjects, or a path.
    if base is field_facts.Subject:
        return tuple(map(build_subject_table, parsed))
    return facts["path"](parsed) if parsed and facts["path"] else parsed


MAX_INTEGER = 10**9
"""Upper bound of integers without a bound of their own: larger ones are typing errors."""
BOOLEAN_WORDS = {
    "true": True,
    "1": True,
    "yes": True,
    "on": True,
    "false": False,
    "0": False,
    "no": False,
    "off": False,
}
"""Values of a switch in a file or in another program's header, in lower case."""
TYPE_DESCRIPTIONS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    tuple: "a list of names, separated by commas",
    field_facts.Prompt: "a list of prompts",
    field_facts.Subject: "a folder of folders, or [[subjects]] tables",
}
"""Type -> its name in a message."""


def convert_value(base: Any, value: Any) -> Any:
    """Return the value in the type; None if it cannot be converted.

    Raises UserError for tables of subjects that cannot be read.
    """
    # Tables, switches and texts.
    if base is field_facts.Subject:
        return subjects.to_tables(value)
    if base is bool:
        if isinstance(value, bool):
            return value
        return BOOLEAN_WORDS.get(value.lower()) if isinstance(value, str) else None
    if base is str:
        return str(value) if isinstance(value, (str, Path)) else None
    # Numbers.
    if base in (int, float):
        try:
            number = None if isinstance(value, bool) else float(value)
        except OverflowError:  # a whole number of hundreds of digits, which `repr` may refuse
            return math.inf
        except (TypeError, ValueError):
            return None
        if base is float or number is None:
            return number
        return parse_integer(value, number)
    # Lists of texts; a single text is a list too.
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, (list, tuple)):
        return None
    # Names may be numbers, such as those of blocks.
    if base is tuple:
        texts = [str(text) if type(text) is int else text for text in texts]
    if any(convert_value(str, text) is None for text in texts):
        return None
    items = ",".join(texts).split(",") if base is tuple else texts
    return tuple(item.strip() for item in items if item.strip())


def parse_integer(value: Any, number: float) -> int | None:
    """Return a value near `number` as an integer, with all digits of a text; None for fractions."""
    if not number.is_integer():
        return None
    try:
        return int(value)
    except ValueError:  # 1e9
        return int(number)


BOUNDS = {
    "low": (operator.ge, "at least"),
    "above": (operator.gt, "more than"),
    "high": (operator.le, "at most"),
    "below": (operator.lt, "less than"),
}
"""A row's bound -> comparison of a value with it, and its name in a message."""


def check_number(name: str, value: float, facts: Mapping[str, Any]) -> None:
    """Raise UserError for a number that is not finite or breaks a bound in the `facts` of its
    row."""
    if not math.isfinite(value):
        raise UserError(f"--{name} {value}: must be a finite number.")
    bounds = {kind: facts[kind] for kind in BOUNDS}
    if bounds["high"] is None and isinstance(value, int):
        bounds["high"] = MAX_INTEGER
    for kind, (is_within, description) in BOUNDS.items():
        bound = bounds[kind]
        if bound is not None and not is_within(value, bound):
            raise UserError(f"--{name} {value:g}: must be {description} {bound:g}.")


def replace_base_name(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings with `base` under its own name. Raises UserError if both names are
    given."""
    values = dict(settings)
    base = values.pop("base", None)
    if base is not None and "pretrained_model_name_or_path" in values:
        raise UserError("base and pretrained_model_name_or_path: give one of them.")
    return values if base is None else values | {"pretrained_model_name_or_path": base}
