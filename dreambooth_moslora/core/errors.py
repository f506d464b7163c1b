"""Exceptions that are no bugs: a person's mistake, and a person's wish to stop."""

import re

__all__ = ["StopRequestedError", "UserError", "is_out_of_memory", "one_line", "shortened", "spelled_out"]

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
NO_MEMORY = re.compile(
    r"can't allocate memory|CUDA error: out of memory|(CUBLAS|CUDNN)_STATUS_(ALLOC_FAILED|NOT_INITIALIZED)"
    r"|could not create a (primitive|memory object)$"
)
"""What the CPU's allocator says, CUDA's libraries when not even their workspace fits, and oneDNN."""
MOST_LETTERS = 1000
"""Of one message: a value of a hundred thousand letters is not shown whole."""


def spelled_out(text: str) -> str:
    """Bytes that are no text, as file names may have, as `\\udcff`, and control characters as `\\x1b`.

    The result can be written anywhere and changes no terminal. Line feeds and tabs stay.
    """
    return CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text.encode("utf-8", "backslashreplace").decode())


def one_line(error: object, most: int = 200) -> str:
    """What another library says of its trouble, however long and on however many lines; its kind if it says nothing."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= most else text[: most - 1] + "…"


def shortened(text: str) -> str:
    """A long message without its middle: it begins with what is wrong and ends with what to do."""
    half = MOST_LETTERS // 2
    return text if len(text) <= MOST_LETTERS else f"{text[:half]} … {text[-half:]}"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, of the machine or of its GPU."""
    is_named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return is_named or bool(NO_MEMORY.search(str(error)))


class StopRequestedError(Exception):
    """The person asked to stop: what is being done can be left, and nothing of it has to be saved."""


class UserError(ValueError):
    """A mistake of the person at the keyboard: its text is one line that says what was wrong and what to do.

    Command-line programs print it without a traceback and exit with code 2. Bytes in it that are no text, as file
    names may have, are spelled out, and the middle of a very long text is left out.
    """

    def __init__(self, text: str):
        super().__init__(shortened(spelled_out(text)))
