"""A run folder and its copy behind a URL: one machine at a time writes the copy.

Files behind a URL that fsspec knows (`s3://`, `gs://`, …). Failed calls are retried; the last error is one line.

A run folder and its copy in a bucket. One machine at a time writes the copy.

URL/NAME/…               the files of a run folder, under their names
URL/NAME/manifest.json   the SHA-256 of the files that belong together, and their writer; written last

A file that the manifest does not name, or names with another digest, is ignored: so a half upload has no
effect. A machine that begins writes its name into the manifest. One that finds another's name there has been
replaced, and stops writing.
"""

import json
import os
import shutil
import stat
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import TypeVar

from dreambooth_moslora.core import UserError, file_digest, one_line
from dreambooth_moslora.disk.processes import CONFIG_NAME, LOG_NAME
from dreambooth_moslora.disk.queue import LOCK_NAME
from dreambooth_moslora.disk.run_folder import RunDir, checkpoint_step
from dreambooth_moslora.extras.cluster.records import FLEET_NAME

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


MANIFEST = "manifest.json"
KEY_BYTES, NAME_BYTES = 1024, 255
"""Most bytes of a key in S3, and of a file name."""
GROWING = {FLEET_NAME, CONFIG_NAME, LOG_NAME, "metrics.jsonl", "train.log"}
"""Files that change all the time: they are taken even when they are newer than the manifest."""


class SupersededError(UserError):
    """Another machine writes this run folder now."""


@dataclass(frozen=True)
class Manifest:
    """`writer` is the machine that writes now; `files` maps names to SHA-256 digests in hex."""

    writer: str = ""
    files: Mapping[str, str] = field(default_factory=dict)


def read_manifest(bucket: Bucket) -> Manifest:
    """The manifest of a run folder; an empty one when it is missing or damaged. Raises UserError for the
    bucket's errors."""
    content = bucket.read(MANIFEST) or b"{}"  # outside of the block: a UserError is a ValueError
    try:
        manifest = Manifest(**json.loads(content))
        files = manifest.files
        if isinstance(manifest.writer, str) and all(map(is_plain, files, files.values())) and not clash(files):
            return manifest
    except (ValueError, TypeError, AttributeError, RecursionError):
        pass
    return Manifest()


def is_plain(name: str, digest: object) -> bool:
    """Whether the name is that of a file within the folder; others may write to the bucket."""
    path = PurePosixPath(name)
    is_within = bool(path.parts) and not path.is_absolute() and ".." not in path.parts
    is_one_spelling = str(path) == name and path.parts == Path(name).parts  # Windows divides names at more characters
    return isinstance(digest, str) and is_within and is_one_spelling and is_possible(name)


def is_possible(name: str) -> bool:
    """Whether a file can have this name, and a bucket this key."""
    try:
        lengths = [len(os.fsencode(part)) for part in (name, *name.split("/"))]
    except UnicodeEncodeError:
        return False
    return lengths[0] <= KEY_BYTES and max(lengths[1:]) <= NAME_BYTES and "\0" not in name


def clash(names: Mapping[str, str]) -> bool:
    """Whether one is to be a file and the folder of another."""
    return any(str(folder) in names for name in names for folder in PurePosixPath(name).parents)


class Mirror:
    """A local `folder` and its copy in `bucket`. Not thread-safe: one process uses it, one call at a time."""

    def __init__(self, bucket: Bucket, folder: Path):
        self.bucket, self.folder, self.writer = bucket, folder, uuid.uuid4().hex
        self.good: Mapping[str, str] | None = None
        self.digests: dict[str, tuple[tuple, str]] = {}

    def pull(self) -> None:
        """Copy the bucket's files that match the manifest into the folder. A checkpoint with a bad file is left out."""
        manifest = read_manifest(self.bucket)
        names = list(manifest.files)
        is_good = dict(zip(names, at_once(lambda name: self.fetch(name, manifest.files[name]), names)))
        self.good = {name: manifest.files[name] for name, good in is_good.items() if good}
        for name in (name for name, good in is_good.items() if not good):
            top = self.folder / PurePosixPath(name).parts[0]
            if checkpoint_step(top) is not None or top == RunDir(self.folder).last_dir:
                shutil.rmtree(top, ignore_errors=True)
            elif name not in GROWING:
                (self.folder / name).unlink(missing_ok=True)

    def fetch(self, name: str, digest: str) -> bool:
        """Whether the file was downloaded with these bytes."""
        target = self.folder / name
        return self.bucket.download(name, target) and file_digest(target) == digest

    def claim(self) -> None:
        """From now on this process is the only writer. Bad files that `pull` has found are named no more."""
        self.write_manifest(read_manifest(self.bucket).files if self.good is None else self.good)

    def push(self) -> None:
        """Make the bucket equal to the folder. Raises SupersededError, and UserError for the bucket's errors.

        What is there is read anew, as a bucket may lose its files: without a manifest all are sent again.
        """
        manifest = read_manifest(self.bucket)
        if manifest.writer not in ("", self.writer):  # empty: it is missing or damaged
            raise SupersededError(f"{self.bucket.url}: another machine has taken it over.")
        digests = self.local_digests()
        changed = [name for name, digest in digests.items() if digest != manifest.files.get(name)]
        at_once(self.send, [name for name in changed if name != FLEET_NAME])
        if FLEET_NAME in changed:  # the record says "done" only after the adapter has arrived
            self.send(FLEET_NAME)
        files = {name: digest for name, digest in digests.items() if name in GROWING or self.digest(name) == digest}
        gone = [name for name in manifest.files if name not in digests]
        self.write_manifest(files)
        at_once(self.bucket.remove, gone)

    def send(self, name: str) -> None:
        with suppress(FileNotFoundError):  # a checkpoint was removed meanwhile; the next push notes it
            self.bucket.upload(self.folder / name, name)

    def local_digests(self) -> dict[str, str]:
        """Digests of all files but temporary ones and locks."""
        found = {}
        for path in sorted(self.folder.rglob("*")):
            name = path.relative_to(self.folder)
            if name.parts[-1] != LOCK_NAME and not any(part.startswith(".") for part in name.parts):
                found[name.as_posix()] = self.digest(name.as_posix())
        return {name: digest for name, digest in found.items() if digest is not None}

    def digest(self, name: str) -> str | None:
        """The file's SHA-256, computed again when the file has changed; None when there is no such file."""
        path = self.folder / name
        try:
            info = path.lstat()
            stamp = (info.st_size, info.st_mtime_ns, info.st_ino)
            known = self.digests.get(name)
            if stat.S_ISREG(info.st_mode) and (known is None or known[0] != stamp):
                known = self.digests[name] = (stamp, file_digest(path))
        except OSError:
            return None
        return known[1] if known and stat.S_ISREG(info.st_mode) else None

    def write_manifest(self, files: Mapping[str, str]) -> None:
        self.bucket.write(MANIFEST, json.dumps(asdict(Manifest(self.writer, files)), indent=1).encode())
