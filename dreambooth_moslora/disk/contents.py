"""Contents of files: text up to a limit, JSON of checked types, digests."""

import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from dreambooth_moslora.disk.atomic import write_atomic
from dreambooth_moslora.errors import UserError, format_validation_error

if TYPE_CHECKING:
    from pydantic import TypeAdapter

M = TypeVar("M")


def hash_values(**facts: object) -> str:
    """Return a hex digest of JSON-able values, the same in every process."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file. Raises UserError for a device, which may have no end."""
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is not a file")
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_stamp(path: Path) -> tuple[int, ...]:
    """Return a file's number, size and times, which change with its content. Raises OSError."""
    facts = path.stat()
    return (facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns)


def hash_files(paths: Iterable[Path], record: Path) -> list[str]:
    """Return the SHA-256 of each file; `record` remembers it, so a large file is read once.

    paths: a link stands for the file behind it
    record: JSON, path -> stamp and digest; if it cannot be read or written, files are hashed again

    Raises OSError for a file that cannot be read.
    """
    remembered: dict[str, tuple[tuple[int, ...], str]] = {}
    with suppress(UserError):
        remembered = read_json(record, dict[str, tuple[tuple[int, ...], str]])

    # The stamp is read before the content: a file that changes meanwhile is hashed again next time.
    digests, is_new = [], False
    for path in (path.resolve() for path in paths):
        stamp = read_stamp(path)
        last_stamp, digest = remembered.get(str(path), ((), ""))
        if last_stamp != stamp:
            digest = hash_file(path)
            remembered[str(path)] = (stamp, digest)
            is_new = True
        digests.append(digest)

    # Entries of deleted files are dropped. Another process may write the record too.
    if is_new:
        remembered = {path: entry for path, entry in remembered.items() if os.path.exists(path)}
        with suppress(OSError):
            record.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(record, json.dumps(remembered, indent=1))
    return digests


MAX_TEXT_BYTES = 32 * 2**20


SHELL_PIPE_FOLDERS = ("/dev", "/proc")
"""Folders of the pipes that shells write in place of `<(…)`: bash the first, zsh the second."""


def read_small_text(path: Path, max_bytes: int = MAX_TEXT_BYTES, errors: str = "strict") -> str:
    """Return the text of a file, or of a shell's `<(…)`; `errors` as in `str.decode`, for bytes
    that are not UTF-8.

    Raises UnicodeDecodeError, and OSError, also for more than `max_bytes`, for a device, which may
    have no end, and for any other pipe, which may have no writer.
    """
    is_shell_pipe = path.is_fifo() and any(map(path.is_relative_to, SHELL_PIPE_FOLDERS))
    if path.exists() and not (path.is_file() or path.is_dir() or is_shell_pipe):
        raise OSError(errno.EINVAL, "it is a pipe or a device, not a file")

    # A pipe has no size, and a sparse file of gigabytes would fill the memory.
    with path.open(encoding="utf-8-sig", errors=errors) as file:
        text = file.read(max_bytes)
        if file.read(1):
            raise OSError(errno.EFBIG, f"it has more than {max_bytes // 2**20} MiB")
    return text


def read_stored_text(path: Path, max_bytes: int = MAX_TEXT_BYTES) -> str:
    """Return the text of a file of a run, whose bytes may be damaged. Raises UserError with its
    name."""
    try:
        return read_small_text(path, max_bytes, errors="replace")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}.") from error


def read_json(path: Path, model: type[M] = dict, make_dict: Callable = dict) -> M:
    """Read a file and return what `parse_json` makes of it. Raises UserError with the file's
    name."""
    try:
        return parse_json(read_small_text(path), model, make_dict)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {explain_read_error(error)}.") from error


def parse_json(text: str | bytes, model: type[M] = dict, make_dict: Callable = dict) -> M:
    """Return JSON as a dict, or as a `model` (a dataclass, `list[str]`, …) of checked types.

    pydantic checks the types strictly: 1 is a float, but "1" and true are not. `make_dict` builds a
    dict from its pairs. Raises UserError with the first wrong value.
    """
    try:
        if model is not dict:
            return build_type_adapter(model).validate_json(text, strict=True)
        values = json.loads(text, object_pairs_hook=make_dict)
    except (ValueError, RecursionError) as error:  # pydantic's own error is a ValueError
        if hasattr(error, "errors"):
            raise UserError(format_validation_error(error)) from error
        raise UserError(f"it is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"expected names and values, found a {type(values).__name__}")
    return values


@cache
def build_type_adapter(model: type[M]) -> "TypeAdapter[M]":
    from pydantic import TypeAdapter  # slow to import, and most commands read no record

    return TypeAdapter(model)


def explain_read_error(error: Exception) -> str:
    """Return the reason why a text file was not read, for a message."""
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return "it is not a text file"
