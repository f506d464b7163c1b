"""Errors, seeds, names, whole files: what every other module may need. It imports no torch.

A draw depends on (seed, what, where), and not on earlier draws. So a resumed run draws what an unbroken one would
have drawn, without saved generator states, and two processes draw what one process draws in two turns (compare
NVlabs/edm2, which re-seeds each step).
"""

import errno
import hashlib
import json
import logging
import os
import random
import re
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache, lru_cache
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch
    from pydantic import TypeAdapter, ValidationError

M = TypeVar("M")

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]|[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
"""Control characters, and those that turn the direction of a line."""
NO_MEMORY = re.compile(
    r"can't allocate memory|out of memory|ALLOC_FAILED|AllocFailed|(CUBLAS|HIPBLAS|CUDNN)_STATUS_NOT_INITIALIZED"
    r"|could not create a (primitive|memory object)$"
)
"""Messages of the CPU's allocator, of Nvidia's, AMD's and Apple's drivers, of libraries, and of oneDNN."""
MOST_LETTERS = 1000  # Most characters of a message: a value of a hundred thousand is not shown whole.


def spelled_out(text: str) -> str:
    """Undecodable bytes, which file names may have, become `\\udcff`, control characters `\\x1b` and `\\u202e`, for any
    file and terminal. Line feeds and tabs stay."""
    return CONTROL.sub(lambda found: escape(ord(found[0])), text.encode("utf-8", "backslashreplace").decode())


def escape(letter: int) -> str:
    return f"\\x{letter:02x}" if letter < 256 else f"\\u{letter:04x}"


def one_line(error: object, most: int = 200) -> str:
    """Another library's error as one line of at most `most` characters; its type if it has no text."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= most else text[: most - 1] + "…"


def first_problem(error: "ValidationError") -> str:
    """What is wrong with the first wrong value that pydantic has found, after its name."""
    found = error.errors(include_url=False)[0]
    place = ".".join(str(part) for part in found["loc"])
    return f"{place}: {found['msg']}" if place else found["msg"]


def shortened(text: str) -> str:
    """A long message without its middle: the beginning says what is wrong, the end what to do."""
    half = MOST_LETTERS // 2
    return text if len(text) <= MOST_LETTERS else f"{text[:half]} … {text[-half:]}"


def is_out_of_memory(error: BaseException) -> bool:
    is_named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return is_named or bool(NO_MEMORY.search(str(error)))


class StopRequestedError(Exception):
    """The user asked to stop: the current work can be dropped without saving."""


class UserError(ValueError):
    """A mistake of the user: one line that says what was wrong and what to do (exit code 2, no traceback)."""

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


def seed_of(*names: object) -> int:
    """A 63-bit seed for this combination of names and numbers."""
    digest = hashlib.blake2b("/".join(map(str, names)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def rng(*names: object) -> random.Random:
    """Python's generator, for crops and orders."""
    return random.Random(seed_of(*names))


def generator(*names: object) -> "torch.Generator":
    """A CPU generator: its numbers do not depend on the device that trains."""
    import torch

    return torch.Generator().manual_seed(seed_of(*names))


def place_of(position: int, length: int, *names: object) -> tuple[int, int]:
    """(epoch, slot) at `position`, when `length` slots are shuffled anew in each epoch."""
    epoch, offset = divmod(position, length)
    return epoch, permutation(length, *names, epoch)[offset]


@lru_cache(maxsize=64)
def permutation(length: int, *names: object) -> tuple[int, ...]:
    return tuple(rng("order", *names).sample(range(length), length))


def default_cache_dir() -> Path:
    """`$XDG_CACHE_HOME/dreambooth_moslora`, or `~/.cache/…`, for all runs. Raises UserError where neither is known."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dreambooth_moslora"
    except RuntimeError:
        raise UserError("this user has no home folder for caches: set XDG_CACHE_HOME, or give --cache_dir.") from None


def content_key(**facts: object) -> str:
    """A hex key of JSON-able values, the same in every process."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256. Raises UserError for what is no file: a device may have no end."""
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is not a file")
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


PACKAGE = Path(__file__).resolve().parent


def clone_folder() -> Path | None:
    """The root of the repository, or None when the program was installed from a wheel."""
    return None if (PACKAGE / "assets").is_dir() else PACKAGE.parent


def assets_folder() -> Path:
    """The folder of the toy world's models, and of `adapters`, `configs`, `studies` and `subjects`."""
    return (clone_folder() or PACKAGE) / "assets"


def import_environment() -> dict[str, str]:
    """Environment variables that let a child process import this program from any folder: PYTHONPATH in a clone."""
    clone = clone_folder()
    if clone is None:
        return {}
    inherited = os.environ.get("PYTHONPATH", "")
    return {"PYTHONPATH": f"{clone}{os.pathsep}{inherited}" if inherited else str(clone)}


MOST_TEXT_BYTES = 32 * 2**20


def check_size(path: Path, most_bytes: int) -> None:
    """Raises OSError for a larger file: a hole of gigabytes on the disk would fill the memory."""
    if path.stat().st_size > most_bytes:
        raise OSError(errno.EFBIG, f"it has more than {most_bytes // 2**20} MiB")


def small_text(path: Path, most_bytes: int = MOST_TEXT_BYTES, errors: str = "strict") -> str:
    """The text of a file; `errors` says what becomes of bytes that are not UTF-8.

    Raises UnicodeDecodeError, and OSError, also for more than `most_bytes`.
    """
    check_size(path, most_bytes)
    return path.read_text(encoding="utf-8-sig", errors=errors)


def stored_text(path: Path, most_bytes: int = MOST_TEXT_BYTES) -> str:
    """The text of a file that a run left, perhaps somebody else's. Raises UserError naming it."""
    try:
        return small_text(path, most_bytes, errors="replace")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}.") from error


def read_json(path: Path, model: type[M] = dict, most_bytes: int = MOST_TEXT_BYTES) -> M:
    """What `from_json` makes of a file. Raises UserError naming the file and its first wrong value."""
    try:
        return from_json(small_text(path, most_bytes), model)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {reason_of(error)}.") from error


def from_json(text: str | bytes, model: type[M] = dict) -> M:
    """The JSON text as a plain dict, or as a `model` (a dataclass, a list of words …) whose types
    pydantic checks: 1 is a float, but no "1" and no true. Raises UserError with the first wrong value.
    """
    try:
        if model is not dict:
            return type_adapter(model).validate_json(text, strict=True)
        found = json.loads(text)
    except (ValueError, RecursionError) as error:  # pydantic's own error is a ValueError
        is_pydantics = hasattr(error, "errors")
        what = first_problem(error) if is_pydantics else f"it is not valid JSON: {error}"
        raise UserError(what) from error
    if not isinstance(found, dict):
        raise UserError(f"expected names and values, found a {type(found).__name__}")
    return found


@cache
def type_adapter(model: type[M]) -> "TypeAdapter[M]":
    from pydantic import TypeAdapter  # not before it is needed: most commands read no record

    return TypeAdapter(model)


def reason_of(error: Exception) -> str:
    """Why a text file was not read."""
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    if isinstance(error, UserError):
        return str(error)
    return error.strerror if isinstance(error, OSError) and error.strerror else "it is not a text file"


def user_path(path: str | Path) -> Path:
    """A path of the user's, `~` resolved. That of an unknown user stays, where pathlib's own raises a RuntimeError."""
    return Path(os.path.expanduser(path))


def find_asset(path: str) -> str:
    """A path of the user's, `~` resolved; `assets/…` that is not there is the program's own (the README's examples)."""
    path = os.path.expanduser(path)
    parts = Path(path).parts
    if parts[:1] != ("assets",) or os.path.exists(path):
        return path
    own = assets_folder().joinpath(*parts[1:])
    return str(own) if own.exists() else path


CLIP, DINO = "openai/clip-vit-large-patch14", "facebook/dinov2-base"  # Score pictures of SDXL
SUBJECT_FILE = "subject.json"  # Beside photos: their token and class word; of a toy, what it is
MAX_WORD_CHARACTERS = 60  # Of a token, and of the word for what photos show.

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def public_name(name: str | Path) -> str:
    """A hub id or `toy` unchanged; of a path, also a Windows path, only its last part, since the rest is private."""
    path = os.path.expanduser(str(name))
    if path and os.path.exists(path):
        return os.path.basename(os.path.abspath(path))
    text = str(name).replace("\\", "/")
    return text if HUB_ID.fullmatch(text) else Path(text).name


def free_name(name: str, is_taken: Callable[[str], bool], separator: str = "_", *, is_numbered: bool = False) -> str:
    """`name`, or the first of `name_2`, `name_3` … that is not taken; with `is_numbered` it begins at `name_1`."""
    if not is_numbered and not is_taken(name):
        return name
    numbers = count(1 if is_numbered else 2)
    return next(numbered for n in numbers if not is_taken(numbered := f"{name}{separator}{n}"))


AMPERE = 8  # The first compute capability of Nvidia's with bf16 convolutions and matrix products.
LIKE_FP32 = "--mixed_precision bf16, or no on Nvidia GPUs before Ampere"
"""What helps where fp16 overflows."""
AMD = ("gfx908", "gfx90a", "gfx94", "gfx95", "gfx11", "gfx12")
"""The architectures of AMD's with matrix units for bf16: CDNA, and RDNA from the third on."""


def process_count() -> int:
    """Processes that a launcher started for this run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Whether this is the run's first process, the only one that prints and writes."""
    return os.environ.get("RANK", "0") == "0"


def half_precision() -> str:
    """bf16 where the current GPU has it, else fp16. There must be a GPU; Apple's have bf16 since macOS 14."""
    import torch  # not before it is needed: a dry run answers at once

    if torch.backends.mps.is_available():
        return "bf16" if torch.backends.mps.is_macos_or_newer(14, 0) else "fp16"
    if torch.version.hip:  # its compute capability is the architecture's number
        has_bf16 = torch.cuda.get_device_properties().gcnArchName.startswith(AMD)
    else:
        has_bf16 = torch.cuda.get_device_capability()[0] >= AMPERE
    return "bf16" if has_bf16 else "fp16"


TEMPORARY = re.compile(r"\.(?P<name>.+)\.(?P<pid>[0-9]{1,9})-(?P<token>[0-9a-f]{8})\.(?P<kind>new|old)")


def atomic_write(path: Path, content: bytes | str) -> None:
    """Write a file completely, or leave its old content. The folder must exist."""
    path = Path(path)
    temporary = temporary_name(path, "new")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        rename(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


IS_OPEN = (5, 32)
"""Errors of Windows for a file that another program has open (ERROR_ACCESS_DENIED, ERROR_SHARING_VIOLATION)."""
WAIT_SEC, AGAIN_SEC = 10.0, 0.1


def rename(source: Path, target: Path) -> None:
    """`os.replace`, tried again for WAIT_SEC while another program has a file there open, which only Windows refuses: a
    viewer, or a scanner of viruses. Raises the last PermissionError."""
    end = time.monotonic() + WAIT_SEC
    while True:
        try:
            return os.replace(source, target)
        except PermissionError as error:
            if getattr(error, "winerror", None) not in IS_OPEN or time.monotonic() > end:
                raise
        time.sleep(AGAIN_SEC)


@contextmanager
def scratch_directory(folder: Path, name: str = "scratch") -> Iterator[Path]:
    """A folder in `folder` for the length of the block. Folders that a killed process left are removed."""
    clean_stale(folder)
    scratch = temporary_name(folder / name, "new")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; it is renamed to `path` when the block ends without an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with scratch_directory(path.parent, path.name) as temporary:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                with file.open("rb+") as opened:
                    os.fsync(opened.fileno())
        sync_folder(temporary)
        old = temporary_name(path, "old")
        if path.exists():  # `recover` repairs a kill between the two renames
            rename(path, old)
        try:
            rename(temporary, path)
        except OSError:
            with suppress(FileNotFoundError):
                rename(old, path)
            raise
        sync_folder(path.parent)
        shutil.rmtree(old, ignore_errors=True)


def remove_directory(path: Path) -> None:
    """Rename it, so that its name is free at once, then delete it. One that is in use stays whole, with a warning."""
    doomed = temporary_name(path, "new")
    try:
        rename(path, doomed)
    except PermissionError as error:
        logging.getLogger(__name__).warning("%s was not removed: %s", path, error.strerror)
    else:
        shutil.rmtree(doomed, ignore_errors=True)


def temporary_name(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}-{own_token(os.getpid())}.{kind}")


@cache
def own_token(pid: int) -> str:
    """`process_token` of this process; `pid` is its own."""
    return process_token(pid) or secrets.token_hex(4)


def process_token(pid: int) -> str:
    """Distinguishes a running process from an earlier one of the same number: systems use numbers again. "" without a
    process, and where its start is not told."""
    birth = birth_of(pid)
    return hashlib.blake2b(f"{pid} {birth}".encode(), digest_size=4).hexdigest() if birth else ""


def birth_of(pid: int) -> str:
    """When the process was started: on Linux the machine's boot and the tick, which no change of the clock alters,
    elsewhere the time. "" without a process, and if it is not told."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        facts = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        return f"{boot} {facts[19]}"
    except (OSError, IndexError):
        import psutil

        try:
            return repr(psutil.Process(pid).create_time())
        except psutil.Error:
            return ""


def is_running(pid: int, token: str) -> bool:
    """Whether the process with this `process_token` still runs; by its number alone where its start is not told. It is
    not asked by a signal: on Windows `os.kill(pid, 0)` ends the process."""
    import psutil

    now = process_token(pid)
    return now == token if now else psutil.pid_exists(pid)


def recover(folder: Path) -> None:
    """Restore a folder's name after a kill between the two renames of its replacement."""
    for path, match in temporaries(folder):
        target = folder / match["name"]
        if match["kind"] == "old" and path.is_dir() and not target.exists() and not is_in_use(match):
            with suppress(OSError):
                os.replace(path, target)


def clean_stale(folder: Path) -> None:
    """Remove temporaries of processes that no longer run from `folder`."""
    recover(folder)
    for path, match in temporaries(folder):
        if path.is_dir() and not is_in_use(match):
            shutil.rmtree(path, ignore_errors=True)
        elif not is_in_use(match):
            path.unlink(missing_ok=True)


def temporaries(folder: Path) -> list[tuple[Path, re.Match[str]]]:
    return [(path, match) for path in folder.iterdir() if (match := TEMPORARY.fullmatch(path.name))]


def is_in_use(temporary: re.Match[str]) -> bool:
    """Whether the process that made it still runs. Each removes its own temporaries itself."""
    return is_running(int(temporary["pid"]), temporary["token"])


def sync_folder(folder: Path) -> None:
    """Flush renames in the folder to the disk; not every system can."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
