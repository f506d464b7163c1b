"""Exceptions that are no bugs: a person's mistake, and a person's wish to stop."""

__all__ = ["StopRequestedError", "UserError", "spelled_out"]


def spelled_out(text: str) -> str:
    """Bytes that are no text, as file names may have, as `\\udcff`: the result can be written anywhere."""
    return text.encode("utf-8", "backslashreplace").decode()


class StopRequestedError(Exception):
    """The person asked to stop: what is being done can be left, and nothing of it has to be saved."""


class UserError(ValueError):
    """A mistake of the person at the keyboard: its text is one line that says what was wrong and what to do.

    Command-line programs print it without a traceback and exit with code 2. Bytes in it that are no text, as file
    names may have, are spelled out.
    """

    def __init__(self, text: str):
        super().__init__(spelled_out(text))
