"""Values from JSON: which are numbers, and a body that must be an object."""

import json
import sys
from typing import Any

from dreambooth_moslora.errors import UserError


def is_number(value: object) -> bool:
    """An int or a float, infinity and NaN among them."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_finite_number(value: object) -> bool:
    """A number that a float holds: no NaN, no infinity, and no int beyond the largest float."""
    return is_number(value) and abs(value) <= sys.float_info.max


def parse_object(body: bytes) -> dict[str, Any]:
    """Raises UserError unless the bytes are UTF-8 and a JSON object, without NaN and not too deeply
    nested."""
    try:
        values = json.loads(body.decode("utf-8"), parse_constant=no_number)
    except (ValueError, RecursionError) as error:
        raise UserError("the body is not valid JSON") from error
    if not isinstance(values, dict):
        raise UserError('the body must be a JSON object like {"prompt": "a dog"}')
    return values


def no_number(word: str) -> None:
    """For `json.loads`, which would take NaN and Infinity. Raises ValueError."""
    raise ValueError(f"{word} is not a JSON number")
