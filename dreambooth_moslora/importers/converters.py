"""Converters of values that several trainers write alike."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from dreambooth_moslora.errors import UserError
from dreambooth_moslora.importers.rows import (
    Ignored,
    Translated,
    UnsupportedValueError,
    format_pair,
)
from dreambooth_moslora.settings.lr_schedules import LR_SCHEDULES
from dreambooth_moslora.settings.optimizers import OPTIMIZERS

OPTIMIZER_NAMES: dict[str, dict[str, Any]] = {
    "adamw": {"optimizer": "AdamW"},
    "adamwbf16": {"optimizer": "AdamW"},
    "adam": {"optimizer": "AdamW", "adam_weight_decay": 0.0},
    "adam8": {"optimizer": "AdamW", "use_8bit_adam": True, "adam_weight_decay": 0.0},
    "adamw8": {"optimizer": "AdamW", "use_8bit_adam": True},
    "adamw8bit": {"optimizer": "AdamW", "use_8bit_adam": True},
    "adam8bit": {"optimizer": "AdamW", "use_8bit_adam": True, "adam_weight_decay": 0.0},
    "pagedadamw8bit": {"optimizer": "AdamW", "use_8bit_adam": True},
    "prodigy": {"optimizer": "Prodigy"},
    "prodigy8bit": {"optimizer": "Prodigy"},
    "schedulefreeadamw": {"optimizer": "AdamWScheduleFree"},
    "adamwschedulefree": {"optimizer": "AdamWScheduleFree"},
    "adafactor": {"optimizer": "Adafactor"},
}
"""Optimizers' names in lower case without separators -> settings."""
PRECISIONS = {"bf16": "bf16", "bfloat16": "bf16", "fp16": "fp16", "float16": "fp16"}
PRECISIONS |= {name: "no" for name in ("no", "fp32", "float32", "tf32")}


def simplify_name(name: Any) -> str:
    """Return a name in lower case without separators: `ADAMW_8BIT` -> `adamw8bit`."""
    return re.sub(r"[^a-z0-9]", "", str(name).rpartition(".")[2].lower())


def convert_resolution(value: Any) -> int:
    """Return the side of the square of the same area, px: of `1024`, `"1024,1024"` or `[832,
    1216]`, a multiple of 8. Raises UnsupportedValueError."""
    sides = value if isinstance(value, (list, tuple)) else re.split(r"[,x]", str(value))
    numbers = [float(side) for side in sides if str(side).strip()]
    if not 1 <= len(numbers) <= 2:
        raise UnsupportedValueError("expected one side, or width and height")
    area = numbers[0] * numbers[-1]
    return round(area**0.5 / 8) * 8


def choose(counterparts: Mapping[str, Any], names: Iterable[str] = ()) -> Callable[[Any], Any]:
    """Make a converter of names that have these counterparts, and no others.

    counterparts: keys may be in lower case without separators
    names: for the message about any other name; by default the keys
    """

    def convert_choice(value: Any) -> Any:
        name = str(value) if str(value) in counterparts else simplify_name(value)
        if name not in counterparts:
            raise UnsupportedValueError(f"{', '.join(names or counterparts)} have a counterpart")
        return counterparts[name]

    return convert_choice


convert_optimizer = choose(OPTIMIZER_NAMES, OPTIMIZERS)
convert_schedule = choose({name: name for name in LR_SCHEDULES})
convert_precision = choose(PRECISIONS)


def read_number(values: Mapping[str, Any], key: str, default: float) -> float:
    """Return a number of the values; the default where there is none. Raises UserError."""
    value = values.get(key)
    try:
        return default if value is None or value == "" else float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{format_pair(key, value)}: expected a number.") from error


def to_positive(value: Any) -> Any:
    """Return the value; None for zero, which means "not" in some trainers."""
    return value if float(value) > 0 else None


AVERAGE_ROW = Ignored(
    "the last weights are published; --optimizer AdamWScheduleFree averages its steps"
)
CLIPPING_ROW = Translated("max_grad_norm", lambda value: float(value) or 1e9, "0 clips nothing")
CAPTION_SUFFIX_ROW = Translated(
    "captions", choose({"txt": None, "caption": None}), "`.txt` and `.caption` are read"
)


def if_true(settings: Mapping[str, Any]) -> Callable[[Any], Mapping[str, Any] | None]:
    """Make a converter of a switch that stands for these settings where it is on."""

    def convert_switch(value: Any) -> Mapping[str, Any] | None:
        is_off = value in (None, False, 0) or str(value).lower() in ("false", "off", "no")
        return None if is_off else settings

    return convert_switch


def flatten_values(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested values by dotted names. A list stays a value; an empty table says nothing."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten_values(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat
