"""Errors of the user in one line, and other libraries' errors as one line."""

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError

CONTROL_CHARACTERS = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f]|[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]"
)
"""Control characters, and those that change the direction of a line."""
OUT_OF_MEMORY_MESSAGES = re.compile(
    r"can't allocate memory|failed to map segment|out of "
    r"memory|ALLOC_FAILED|AllocFailed|(CUBLAS|HIPBLAS|CUDNN)_STATUS_NOT_INITIALIZED|could not "
    r"create a (primitive|memory object)$"
)
"""Messages of allocators and drivers (CPU, Nvidia, AMD, Apple), of the loader of libraries, and of
oneDNN."""


def escape_control_characters(text: str) -> str:
    """Return the text with control characters as `\\x1b` or `\\u202e`, undecodable bytes as
    `\\udcff`.

    Line feeds and tabs stay. The result fits any file and terminal.
    """
    decodable = text.encode("utf-8", "backslashreplace").decode()
    return CONTROL_CHARACTERS.sub(lambda match: format_escape(ord(match[0])), decodable)


def format_escape(letter: int) -> str:
    """Return a character's number as Python writes it in a string."""
    return f"\\x{letter:02x}" if letter < 256 else f"\\u{letter:04x}"


def format_error(error: object, max_characters: int = 200) -> str:
    """Return another library's error in one line of at most `max_characters`; its type if it is
    empty."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= max_characters else text[: max_characters - 1] + "…"


def format_validation_error(error: "ValidationError") -> str:
    """Return the name of the first wrong value that pydantic found, and its problem."""
    problem = error.errors(include_url=False)[0]
    name = ".".join(map(str, problem["loc"]))
    return f"{name}: {problem['msg']}" if name else problem["msg"]


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory was lacking, on any device: each library has its own message."""
    is_named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return is_named or bool(OUT_OF_MEMORY_MESSAGES.search(str(error)))


class StopRequestedError(Exception):
    """Request of the user to stop: the current work can be dropped without saving."""


class UserError(ValueError):
    """Mistake of the user, in one line with what to do (exit code 2, no traceback)."""

    def __init__(self, text: str):
        super().__init__(escape_control_characters(text))
