"""Errors that are not bugs, and what counts as a number in files that anybody may have written.

Exceptions that are not bugs: a user's mistake, and a request to stop.

What counts as a number in files and requests that anybody may have written: a bool does not.
"""

import json
import re
import sys
from typing import Any

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]|[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
"""Control characters, and those that turn the direction of a line."""
NO_MEMORY = re.compile(
    r"can't allocate memory|out of memory|ALLOC_FAILED|AllocFailed|(CUBLAS|HIPBLAS|CUDNN)_STATUS_NOT_INITIALIZED"
    r"|could not create a (primitive|memory object)$"
)
"""Messages of the CPU's allocator, of the drivers of Nvidia's, AMD's and Apple's GPUs, of libraries without memory for
their workspace, and of oneDNN."""
MOST_LETTERS = 1000
"""Most characters of a message: a value of a hundred thousand is not shown whole."""


def spelled_out(text: str) -> str:
    """Undecodable bytes, which file names may have, become `\\udcff`, control characters `\\x1b` and `\\u202e`.

    The result can be written anywhere and does not affect a terminal. Line feeds and tabs stay.
    """
    return CONTROL.sub(lambda found: escape(ord(found[0])), text.encode("utf-8", "backslashreplace").decode())


def escape(letter: int) -> str:
    return f"\\x{letter:02x}" if letter < 256 else f"\\u{letter:04x}"


def one_line(error: object, most: int = 200) -> str:
    """Another library's error as one line of at most `most` characters; its type if it has no text."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= most else text[: most - 1] + "…"


def shortened(text: str) -> str:
    """A long message without its middle: the beginning says what is wrong, the end what to do."""
    half = MOST_LETTERS // 2
    return text if len(text) <= MOST_LETTERS else f"{text[:half]} … {text[-half:]}"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the machine or its GPU ran out of memory."""
    is_named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return is_named or bool(NO_MEMORY.search(str(error)))


class StopRequestedError(Exception):
    """The user asked to stop: the current work can be dropped without saving."""


class UserError(ValueError):
    """A mistake of the user: one line that says what was wrong and what to do.

    Command-line programs print it without a traceback and exit with code 2. Undecodable bytes are spelled out,
    and a very long text loses its middle.
    """

    def __init__(self, text: str):
        super().__init__(shortened(spelled_out(text)))


def is_number(value: object) -> bool:
    """An int or a float, infinity and NaN among them."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_finite_number(value: object) -> bool:
    """A number that a float holds: no NaN, no infinity, and no int beyond the largest float."""
    return is_number(value) and abs(value) <= sys.float_info.max


def parse_object(body: bytes) -> dict[str, Any]:
    """Raises UserError unless the bytes are UTF-8 and a JSON object, without NaN and not too deeply nested."""
    try:
        values = json.loads(body.decode("utf-8"), parse_constant=no_number)
    except (ValueError, RecursionError) as error:
        raise UserError("the body is not valid JSON") from error
    if not isinstance(values, dict):
        raise UserError('the body must be a JSON object like {"prompt": "a dog"}')
    return values


def no_number(word: str) -> None:
    raise ValueError(f"{word} is not a JSON number")
