"""Facts that a row of the settings' table may have, and the names of layers in patterns.

Names of layers in `--target_modules`, `--rank_pattern` and `--alpha_pattern`:

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
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, NewType

from dreambooth_moslora.errors import UserError

ATTENTION_LAYERS = ("to_k", "to_q", "to_v", "to_out.0")
"""Projections of attention, as diffusers' scripts name them: MoSLoRA's targets in SDXL."""
TEXT_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")
"""Projections of attention in a CLIP text encoder."""
BLORA_BLOCKS = {
    "blora_content": "up_blocks.0.attentions.0",
    "blora_style": "up_blocks.0.attentions.1",
}
"""B-LoRA (Frenkel et al. 2024, arXiv 2403.14572): the blocks of SDXL that hold content and style.
"""
LAYER_VALUE = re.compile(r"\s*(?P<name>[^=:\s]+)\s*[=:]\s*(?P<value>\S+)\s*")
"""`to_k=8` or `to_k:8`."""


def is_target(path: str, name: str) -> bool:
    """Return whether `name` in `--target_modules` gives the layer at `path` an adapter."""
    name = expand_layer_name(name)
    return is_path_match(path, name) or (
        path.startswith(f"{name}.") and any(is_path_match(path, end) for end in ATTENTION_LAYERS)
    )


def is_adapted(path: str, names: Iterable[str]) -> bool:
    return any(is_target(path, name) for name in names)


def is_pattern_match(path: str, name: str) -> bool:
    """Return whether `name` in a pattern matches the layer at `path`."""
    name = expand_layer_name(name)
    return is_path_match(path, name) or path.startswith(f"{name}.")


def expand_layer_name(name: str) -> str:
    return BLORA_BLOCKS.get(name, name.removeprefix("unet."))


def is_path_match(path: str, name: str) -> bool:
    """Return whether the path, or its end after a dot, matches the name."""
    if "*" in name:
        return fnmatchcase(path, name) or fnmatchcase(path, f"*.{name}")
    return f".{path}".endswith(f".{name}")


def parse_pattern(flag: str, text: str) -> tuple[str, float]:
    """Return (name, value) of `down_blocks.2.*=8`, or with a colon; a rank must be an integer.

    Raises UserError.
    """
    match = LAYER_VALUE.fullmatch(text)
    try:
        value = float(match["value"]) if match else math.nan
    except ValueError:
        value = math.nan

    # Comparisons with NaN are false, so a text without a number is refused here too.
    is_rank = flag == "rank_pattern"
    is_valid = 0 < value <= 4096 and value.is_integer() if is_rank else 0 < value <= 1e6
    if not is_valid:
        kind = "a whole number from 1 to 4096" if is_rank else "a number above 0"
        raise UserError(
            f"--{flag} {text}: expected a layer's name and {kind}, such as down_blocks.2.*=8."
        )
    return match["name"], value


def find_pattern_value(patterns: Iterable[str], flag: str, path: str) -> float | None:
    """Return the value of the first pattern that matches the layer; None if none does."""
    values = (parse_pattern(flag, text) for text in patterns)
    return next((value for name, value in values if is_pattern_match(path, name)), None)


Prompt = NewType("Prompt", str)
"""Text that may hold commas: a list of prompts is not split at them."""
Subject = NewType("Subject", Any)
"""A `parsing.SubjectTable`; before conversion, a mapping of its settings."""
COMMAND_WORDS = "words"
"""In `FieldFacts.yields_to`: a folder and a word on the command line, `train photos/dog dog`."""
IgnoredCases = tuple[tuple[str, Callable[[Any], object]], ...]
"""Ends of the sentence "--flag has no effect …", each with the condition."""


@dataclass(frozen=True)
class FieldFacts:
    """Facts of a setting beside its name, type and default; they become the field's metadata."""

    help: str
    group: str
    low: float | None = None
    above: float | None = None
    high: float | None = None
    below: float | None = None  # low <= value <= high, above < value < below
    choices: Collection[str] = ()
    # other spellings, in lower case -> choice
    spellings: Mapping[str, str] = field(default_factory=dict)
    # `train` needs it as a flag or in a file, except with a folder and a word
    required: bool = False
    secret: bool = False  # never written to a file
    # finds the file or folder; no shell expands `~` in files
    path: Callable[[str], str] | None = None
    per_process: bool = False  # may differ between the processes of one run
    same_on_resume: bool = False  # a resumed run must have the checkpoint's value
    per_subject: bool = False  # each of several subjects may have its own
    # dropped from --config if one is given (`per_subject`: subjects, COMMAND_WORDS)
    yields_to: tuple[str, ...] = ()
    replaces: tuple[str, ...] = ()  # the settings that it decides
    family: str = ""  # "unet" or "flow", if only such denoisers obey it
    # settings that cannot be combined with it -> why
    excludes: Mapping[str, str] = field(default_factory=dict)
    # whether a published file contains it: "always", or "if_changed" (only if it differs from the
    # default, so that other files keep their bytes). Not for settings that can hold the user's text
    publish: str | None = None
    idle: IgnoredCases = ()  # when it has no effect
    packages: Mapping[object, str] = field(default_factory=dict)  # value -> package that it needs
    flag: str = ""  # preferred name of its flag, if not its own
    also: str = ""  # further names of its flag, by diffusers' scripts of other models


def build_field_maker(group: str) -> Callable[..., Any]:
    """Return the function that makes the rows of one group: dataclass fields with `FieldFacts`."""

    def make_field(default: Any, help: str, **facts: Any) -> Any:
        # Tables of several subjects replace it, and so do a folder and a word.
        if facts.get("per_subject"):
            facts = {"yields_to": ("subjects", COMMAND_WORDS)} | facts
        row = FieldFacts(help=help, group=group, **facts)
        return field(default=default, metadata=vars(row))

    return make_field


def ignore_when(condition: str, applies: Callable[[Any], object]) -> IgnoredCases:
    """Make a setting idle where `applies(run)`; `condition` completes "--flag has no effect …"."""
    return ((condition, applies),)


def ignore_unless(**required: Any) -> IgnoredCases:
    """Make a setting idle without these: `captions="auto"` means "without --captions auto"."""
    flags = []
    for name, value in required.items():
        flags.append(f"--{name}" if value is True else f"--{name} {value}")

    def is_missing(run: Any) -> bool:
        return any(getattr(run, name) != value for name, value in required.items())

    return ignore_when(f"without {' '.join(flags)}", is_missing)


def find_nearest_name(name: str, names: Iterable[str]) -> str | None:
    """Return the name that the user probably meant; None if none is similar."""
    names = list(names)

    # Prefer a name that begins so, unless the text is very short.
    if len(name) > 3:
        longer_names = [candidate for candidate in names if candidate.startswith(name)]
        if longer_names:
            return min(longer_names, key=len)

    # Else look for a name with a typing error.
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return close[0] if close else None
