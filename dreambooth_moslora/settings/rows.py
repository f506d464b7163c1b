"""How a row of the settings' table is written, converted and checked, with the names of layers in patterns.

Layers in `--target_modules`, `--rank_pattern` and `--alpha_pattern` are named so:

to_q, attn1.to_q          layers whose path ends so: PEFT's own rule
up_blocks.0.attentions.1  a block: its attention projections, as in B-LoRA and diffusers' scripts
down_blocks.2.*, *conv1   `*` matches anything: every layer whose path, or the end of it, matches
blora_style               another name of a block

In a pattern a block stands for all its layers that have an adapter. A leading `unet.` is ignored.
"""

import difflib
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import Field, dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from types import UnionType
from typing import Any, NewType, get_args, get_type_hints

from dreambooth_moslora.core import UserError, is_number
from dreambooth_moslora.settings.subjects import to_tables

ATTENTION = ("to_k", "to_q", "to_v", "to_out.0")
BLOCKS = {"blora_content": "up_blocks.0.attentions.0", "blora_style": "up_blocks.0.attentions.1"}
"""B-LoRA (Frenkel et al. 2024, arXiv 2403.14572): the blocks of SDXL that hold content and style."""
PATTERN = re.compile(r"\s*(?P<name>[^=:\s]+)\s*[=:]\s*(?P<value>\S+)\s*")


def is_target(path: str, name: str) -> bool:
    """Whether `name` in `--target_modules` gives the layer at `path` an adapter."""
    name = full_name(name)
    return is_like(path, name) or (path.startswith(f"{name}.") and any(is_like(path, end) for end in ATTENTION))


def is_adapted(path: str, names: Iterable[str]) -> bool:
    return any(is_target(path, name) for name in names)


def is_meant(path: str, name: str) -> bool:
    """Whether `name` in a pattern matches the layer at `path`."""
    name = full_name(name)
    return is_like(path, name) or path.startswith(f"{name}.")


def full_name(name: str) -> str:
    return BLOCKS.get(name, name.removeprefix("unet."))


def is_like(path: str, name: str) -> bool:
    """Whether the path, or its end after a dot, matches the name."""
    if "*" in name:
        return fnmatchcase(path, name) or fnmatchcase(path, f"*.{name}")
    return f".{path}".endswith(f".{name}")


def parse_pattern(flag: str, text: str) -> tuple[str, float]:
    """`down_blocks.2.*=8`, or with a colon -> (name, value); a rank must be an integer. Raises UserError."""
    match = PATTERN.fullmatch(text)
    try:
        value = float(match["value"]) if match else math.nan
    except ValueError:
        value = math.nan
    is_rank = flag == "rank_pattern"
    if match is None or not 0 < value <= 1e6 or (is_rank and not (value.is_integer() and value <= 4096)):
        kind = "a whole number from 1 to 4096" if is_rank else "a number above 0"
        raise UserError(f"--{flag} {text}: expected a layer's name and {kind}, such as down_blocks.2.*=8.")
    return match["name"], value


def pattern_value(patterns: Iterable[str], flag: str, path: str) -> float | None:
    """The value of the first pattern that matches the layer; None when none does."""
    values = (parse_pattern(flag, text) for text in patterns)
    return next((value for name, value in values if is_meant(path, name)), None)


def is_text_projection(path: str) -> bool:
    """Whether the UNet's layer at `path` projects the text: to_k and to_v of cross-attention."""
    return path.endswith((".attn2.to_k", ".attn2.to_v"))


MOST = 10**9  # Upper bound of integers without a bound of their own: larger ones are typing errors.

Prompt = NewType("Prompt", str)
"""Text that may hold commas. A list of prompts is not split at commas; a list of names is."""
Subject = NewType("Subject", Any)
"""A `table.SubjectTable`; before conversion, a mapping of a subject's settings."""
FieldType = tuple[Any, bool]
"""(bool, int, float, str, tuple for names, Prompt or Subject for several of them; whether None is allowed)."""
WORDS = "words"
"""Stands in `Row.yields_to` for a folder and a word on the command line: `train photos/dog dog`."""
Idle = tuple[tuple[str, Callable[[Any], object]], ...]
"""(how "--flag has no effect …" goes on, whether that is so in a run of these settings), any number of times."""


@dataclass(frozen=True)
class Row:
    """What the table says of a setting beside its name, type and default; it becomes the field's metadata."""

    help: str
    group: str
    low: float | None = None
    above: float | None = None
    high: float | None = None
    below: float | None = None  # low <= value <= high, above < value < below
    choices: Collection[str] = ()
    spellings: Mapping[str, str] = field(default_factory=dict)  # other spellings, in lower case -> choice
    required: bool = False  # must be given as a flag or in a file
    secret: bool = False  # never written to a file
    path: Callable[[str], str] | None = None
    """for a file or folder: what finds it; `~` is expanded, since no shell expands it in files and after `=`"""
    per_process: bool = False  # may differ between the processes of one run
    per_subject: bool = False  # each of several subjects may have its own
    check: bool = False  # the command `check` takes it too
    yields_to: tuple[str, ...] = ()
    """a --config file's value is dropped if the command line gives one of these (default if `per_subject`: subjects,
    and WORDS)"""
    replaces: tuple[str, ...] = ()  # if it is given, these are not taken from the file of --like
    publish: str | None = None
    """whether a published file tells it and --like takes it: "always", or "if_changed" (only if it differs from the
    default, so that other files keep their bytes). Only for what cannot hold text of the user's."""
    shapes: bool | Callable[[Any], bool] = False
    """it may shape the weights though a published file may lack it: whenever it is not idle, or in these runs"""
    idle: Idle = ()  # when it has no effect
    packages: Mapping[object, str] = field(default_factory=dict)  # value -> package that it needs
    resume: str | None = None  # "same": a resumed run must have the checkpoint's value
    kohya: str = ""  # its keys in kohya's headers
    of_kohya: Callable[[str], Any] = str  # its value from such a key's text; None if the key does not set it
    elsewhere: str = ""  # flags of other trainers that mean the same


def grouped(group: str) -> Callable[..., Any]:
    """What makes a row of the group of the help: a dataclass field with the facts of a `Row`."""

    def option(default: Any, help: str, **facts: Any) -> Any:
        if facts.get("per_subject"):
            facts = {"yields_to": ("subjects", WORDS)} | facts
        return field(default=default, metadata=vars(Row(help, group, **facts)))

    return option


def where(words: str, applies: Callable[[Any], object]) -> Idle:
    return ((words, applies),)


def unless(**needed: Any) -> Idle:
    """No effect without these settings: `unless(captions="auto")` is "without --captions auto"."""
    flags = " ".join(f"--{name}" if value is True else f"--{name} {value}" for name, value in needed.items())
    return where(f"without {flags}", lambda run: any(getattr(run, name) != value for name, value in needed.items()))


def one_side(text: str) -> str:
    """`(1024, 1024)` -> 1024; other shapes are kept, and fail the later check."""
    sides = re.findall(r"\d{1,9}", text)
    return sides[0] if len(set(sides)) == 1 else text


def optimizer_name(text: str) -> str:
    """`bitsandbytes.optim.adamw.AdamW8bit(weight_decay=0.1)` -> AdamW."""
    name = text.partition("(")[0].rpartition(".")[2]
    return "AdamW" if name.lower() == "adamw8bit" else name


def field_types(owner: type) -> dict[str, FieldType]:
    types = {}
    for name, hint in get_type_hints(owner).items():
        kinds = get_args(hint) if isinstance(hint, UnionType) else (hint,)
        kind = next(k for k in kinds if k is not type(None))
        if kind not in (bool, int, float, str):
            kind = next((item for item in (Prompt, Subject) if item in get_args(kind)), tuple)
        types[name] = kind, type(None) in kinds
    return types


def checked(item: Field, value: Any, kind: FieldType) -> Any:
    """The value of any source, converted to the field's type and within its limits. Raises UserError."""
    name, facts, (base, is_optional) = item.name, item.metadata, kind
    if value is None and is_optional:
        return None
    found = as_type(base, value)
    if found is None:
        is_undecodable = isinstance(value, (str, Path)) and not is_text(str(value))
        raise UserError(f"--{name} {value!r}: {NO_TEXT if is_undecodable else f'expected {EXPECTED[base]}'}.")
    found = facts["spellings"].get(str(found).lower(), found)
    if found != item.default:
        if facts["choices"] and found not in facts["choices"]:
            raise UserError(f"--{name} {found}: choose one of {', '.join(facts['choices'])}.")
        if is_number(found):
            check_number(name, found, **{bound: facts[bound] for bound in ("low", "above", "high", "below")})
    return facts["path"](found) if found and facts["path"] else found


def as_type(base: Any, value: Any) -> Any:
    """The value as one of the type; None if it is none. Raises UserError for tables of subjects that cannot be read."""
    if base is Subject:
        return to_tables(value)
    if base is bool:
        return value if isinstance(value, bool) else BOOLEANS.get(value.lower()) if isinstance(value, str) else None
    if base is str:
        return str(value) if isinstance(value, (str, Path)) and is_text(str(value)) else None
    if base in (int, float):
        try:
            number = None if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            return None
        if base is float or number is None:
            return number
        return int(value) if isinstance(value, int) else int(number) if number.is_integer() else None
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, (list, tuple)) or any(as_type(str, text) is None for text in texts):
        return None
    words = ",".join(texts).split(",") if base is tuple else texts
    return tuple(word.strip() for word in words if word.strip())


def is_text(value: str) -> bool:
    """False for NUL and for undecodable bytes: they cannot be written into the run's files."""
    return "\0" not in value and value == value.encode("utf-8", "replace").decode()


BOOLEANS = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}
NO_TEXT = "not valid UTF-8, or with a NUL, so that no file of the run can hold it; write or rename it in UTF-8"
EXPECTED = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    tuple: "a list of names, separated by commas",
    Prompt: "a list of prompts",
    Subject: "a folder of folders, a JSON file, or [[subjects]] tables",
}


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
