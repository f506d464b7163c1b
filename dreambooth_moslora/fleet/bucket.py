"""Files behind a URL that fsspec knows (`s3://`, `gs://`, …). Failed calls are retried; the last error is one line."""

import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from dreambooth_moslora.core.errors import UserError, one_line

__all__ = ["Bucket", "at_once", "is_url", "local_path"]

T = TypeVar("T")
TRIES, FIRST_WAIT_SEC = 6, 0.5
"""The waits double, so an outage of about 15 seconds is survived."""
ONE_TRY = {"s3": {"config_kwargs": {"retries": {"total_max_attempts": 1}}}}
"""Options by which a store's library tries once: with its own 25 tries for each of ours, giving up takes minutes."""
AT_ONCE = 8
EXTRAS = {"s3": "s3fs", "gs": "gcsfs"}
"""The package's extra for each URL scheme, and the library that it installs."""
HOPELESS = (
    *("NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "DefaultCredentialsError"),
    *("ProfileNotFound", "ParamValidationError"),
)
"""Errors of the stores' libraries that a retry does not change."""
ONE_PROCESS = "memory"
"""The scheme of a store that no other process sees."""
DENIED = "access denied ({}); look at the credentials, and at what they may do there"


def is_url(place: str) -> bool:
    return "://" in place


def local_path(url: str) -> str | None:
    """The path of a `file://` URL; None for other schemes."""
    scheme, _, path = url.partition("://")
    return path if scheme in ("file", "local") else None


class Bucket:
    """A folder behind `url`. All names are relative to it, with slashes.

    Raises UserError for a URL without a bucket, and when a library is missing. Each method raises UserError for an
    error that outlasts the retries.
    """

    def __init__(self, url: str):
        from fsspec.core import url_to_fs

        scheme, _, place = url.partition("://")
        if not scheme or not place.strip("/") or scheme == ONE_PROCESS:
            raise UserError(f"{url}: names no bucket that several machines see; write it like s3://BUCKET/PATH.")
        self.url = url.rstrip("/")
        try:
            self.files, root = url_to_fs(self.url, **ONE_TRY.get(scheme, {}))
        except ImportError as error:
            library = EXTRAS.get(scheme)
            how = f"it is the extra `{scheme}`: pip install {library}" if library else one_line(error)
            raise UserError(f"{url}: a library for {scheme}:// is missing; {how}.") from error
        except Exception as error:  # file systems raise errors of their own types
            raise UserError(f"{url}: {one_line(error)}.") from error
        self.root = root.rstrip("/")
        if scheme in ONE_TRY:
            self.files.retries = 1

    def __truediv__(self, name: str) -> "Bucket":
        return Bucket(f"{self.url}/{name}")

    def read(self, name: str) -> bytes | None:
        """None when there is no such file."""
        return self.tried(name, lambda path: self.files.cat_file(path), absent=None)

    def exists(self, name: str) -> bool:
        return self.tried(name, self.files.exists)

    def write(self, name: str, content: bytes) -> None:
        with tempfile.NamedTemporaryFile() as file:
            file.write(content)
            file.flush()
            self.upload(Path(file.name), name)

    def upload(self, source: Path, name: str) -> None:
        """Raises FileNotFoundError when `source` has been deleted meanwhile."""
        self.tried(name, lambda path: self.files.put_file(str(source), path), source=source)

    def download(self, name: str, target: Path) -> bool:
        """Returns whether the file existed."""
        target.parent.mkdir(parents=True, exist_ok=True)
        return self.tried(name, lambda path: self.files.get_file(path, str(target)) or True, absent=False)

    def remove(self, name: str) -> None:
        self.tried(name, self.files.rm_file, absent=None)

    def tried(self, name: str, action: Callable[[str], T], source: Path | None = None, **absent: T) -> T:
        """Call `action` with the full path and retry it on errors. Returns `absent` when the file does not exist.

        Raises UserError for an error that outlasts the retries, and FileNotFoundError when `source` is gone.
        """
        for wait in range(TRIES):
            try:
                self.files.invalidate_cache()
                return action(f"{self.root}/{name}")
            except PermissionError as error:
                raise UserError(f"{self.url}/{name}: {DENIED.format(one_line(error))}.") from error
            except FileNotFoundError as error:
                if source is not None and not source.exists():
                    raise
                if "absent" in absent:
                    return absent["absent"]
                raise UserError(f"{self.url}: not there: {one_line(error)}.") from error
            except Exception as error:  # network and service errors differ by library
                if any(kind.__name__ in HOPELESS for kind in type(error).__mro__):
                    raise UserError(f"{self.url}/{name}: {one_line(error)}.") from error
                if wait == TRIES - 1:
                    raise UserError(f"{self.url}/{name}: {one_line(error)}, {TRIES} times.") from error
            time.sleep(FIRST_WAIT_SEC * 2**wait)
        raise AssertionError


def at_once(function: Callable[..., T], items: Iterable) -> list[T]:
    """Call `function` on all items in threads; results keep the items' order. After an error no further call
    begins; it is raised when those under way have ended."""
    with ThreadPoolExecutor(AT_ONCE) as threads:
        return list(threads.map(function, items))
