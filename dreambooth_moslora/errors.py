"""Errors for the person at the keyboard, and other libraries' errors as one line."""

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError

CONTROL_CHARACTERS = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f]|[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]"
)
"""Control characters, and those that turn the direction of a line."""
OUT_OF_MEMORY_MESSAGES = re.compile(
    r"can't allocate memory|failed to map segment|out of "
    r"memory|ALLOC_FAILED|AllocFailed|(CUBLAS|HIPBLAS|CUDNN)_STATUS_NOT_INITIALIZED|could not "
    r"create a (primitive|memory object)$"
)
"""Messages of the CPU's allocator, of a library that is loaded, of Nvidia's, AMD's and Apple's
drivers, of libraries, and of oneDNN."""


def escape_control_characters(text: str) -> str:
    """Undecodable bytes, which file names may have, become `\\udcff`, control characters `\\x1b`
    and `\\u202e`, for any file and terminal. Line feeds and tabs stay."""
    decodable = text.encode("utf-8", "backslashreplace").decode()
    return CONTROL_CHARACTERS.sub(lambda found: format_escape(ord(found[0])), decodable)


def format_escape(letter: int) -> str:
    """A character's number as Python writes it in a string."""
    return f"\\x{letter:02x}" if letter < 256 else f"\\u{letter:04x}"


def format_error(error: object, max_characters: int = 200) -> str:
    """Another library's error as one line of at most `most` characters; its type if it is empty."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= max_characters else text[: max_characters - 1] + "…"


def format_validation_error(error: "ValidationError") -> str:
    """What is wrong with the first wrong value that pydantic has found, after its name."""
    found = error.errors(include_url=False)[0]
    place = ".".join(str(part) for part in found["loc"])
    return f"{place}: {found['msg']}" if place else found["msg"]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was lacking, on any device: each library says it in its own words."""
    is_named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return is_named or bool(OUT_OF_MEMORY_MESSAGES.search(str(error)))


class StopRequestedError(Exception):
    """The user asked to stop: the current work can be dropped without saving."""


class UserError(ValueError):
    """A mistake of the user: one line that says what was wrong and what to do (exit code 2, no
    traceback)."""

    def __init__(self, text: str):
        super().__init__(escape_control_characters(text))
