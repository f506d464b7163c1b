"""A run folder and its copy in a bucket.

The bucket is a URL that fsspec knows (`s3://`, `gs://`, …). One machine at a time writes the copy.

URL/NAME/…               the files of a run folder, under their names
URL/NAME/manifest.json   the SHA-256 of the files that belong together, and their writer

The manifest is written last. A file that it does not name, or names with another digest, is
ignored: so a half upload has no effect. A machine that begins writes its name into the manifest.
One that finds another's name there has been replaced, and stops writing.
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

from dreambooth_moslora.disk import processes, queue, run_folder
from dreambooth_moslora.disk.contents import file_digest, from_json
from dreambooth_moslora.errors import UserError, one_line
from dreambooth_moslora.extras.cluster.records import FLEET_NAME

T = TypeVar("T")
TRIES = 6
FIRST_WAIT_SEC = 0.5
"""The waits between the tries double, so an outage of about 15 seconds is survived."""
ONE_TRY = {"s3": {"config_kwargs": {"retries": {"total_max_attempts": 1}}}}
"""Options by which a store's library tries once: with its own 25 tries for each of ours, giving up
takes minutes."""
AT_ONCE = 8
"""Transfers at the same time."""
EXTRAS = {"s3": "s3fs", "gs": "gcsfs"}
"""URL scheme, which is also the name of the package's extra -> the library that it installs."""
HOPELESS = (
    "NoCredentialsError",
    "PartialCredentialsError",
    "CredentialRetrievalError",
    "DefaultCredentialsError",
    "ProfileNotFound",
    "ParamValidationError",
)
"""Errors of the stores' libraries that a retry does not change."""
ONE_PROCESS = "memory"
"""The scheme of a store that no other process sees."""
DENIED = "access denied ({}); look at the credentials, and at what they may do there"
"""What a person reads when the store refuses; {} is the store's own line."""


class Bucket:
    """A folder behind `url`; names are relative to it, with slashes.

    Each method retries failed calls. Raises UserError for a URL without a bucket, a missing
    library, and errors that last.
    """

    def __init__(self, url: str):
        from fsspec.core import url_to_fs

        # a place that other machines see, too
        scheme, _, place = url.partition("://")
        if not scheme or not place.strip("/") or scheme == ONE_PROCESS:
            raise UserError(
                f"{url}: names no bucket that several machines see; write it like s3://BUCKET/PATH."
            )

        # the store's library, which may be missing
        self.url = url.rstrip("/")
        try:
            self.files, root = url_to_fs(self.url, **ONE_TRY.get(scheme, {}))
        except ImportError as error:
            how = one_line(error)
            if library := EXTRAS.get(scheme):
                how = f"it is the extra `{scheme}`: pip install {library}"
            raise UserError(f"{url}: a library for {scheme}:// is missing; {how}.") from error
        except Exception as error:  # file systems raise errors of their own types
            raise UserError(f"{url}: {one_line(error)}.") from error
        self.root = root.rstrip("/")
        # s3fs has retries of its own, beside those of the library below it
        if scheme in ONE_TRY:
            self.files.retries = 1

    def __truediv__(self, name: str) -> "Bucket":
        return Bucket(f"{self.url}/{name}")

    def read(self, name: str) -> bytes | None:
        """The file's content; None when there is no such file."""
        return self.tried(name, lambda path: self.files.cat_file(path), absent=None)

    def exists(self, name: str) -> bool:
        return self.tried(name, self.files.exists)

    def write(self, name: str, content: bytes) -> None:
        # a folder, as Windows lets nobody open a temporary file again
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "content"
            file.write_bytes(content)
            self.upload(file, name)

    def upload(self, source: Path, name: str) -> None:
        """Raises FileNotFoundError when `source` has been deleted meanwhile."""
        self.tried(name, lambda path: self.files.put_file(str(source), path), source=source)

    def download(self, name: str, target: Path) -> bool:
        """Returns whether the file existed."""
        target.parent.mkdir(parents=True, exist_ok=True)
        return self.tried(
            name, lambda path: self.files.get_file(path, str(target)) or True, absent=False
        )

    def remove(self, name: str) -> None:
        self.tried(name, self.files.rm_file, absent=None)

    def tried(
        self, name: str, action: Callable[[str], T], source: Path | None = None, **absent: T
    ) -> T:
        """Call `action` with the full path, again after an error that may pass.

        name: relative to the bucket's folder
        action: its only argument is the full path
        source: the local file that is sent, if one is
        absent: what to return when the bucket has no such file

        Raises FileNotFoundError when `source` is gone, and UserError for all other errors.
        """
        for wait in range(TRIES):
            try:
                # other machines write there, so no listing may be remembered
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
                    raise UserError(
                        f"{self.url}/{name}: {one_line(error)}, {TRIES} times."
                    ) from error
            time.sleep(FIRST_WAIT_SEC * 2**wait)
        raise AssertionError


def at_once(function: Callable[..., T], items: Iterable) -> list[T]:
    """Call `function` on all items in threads, results in order. After an error no further call
    begins."""
    with ThreadPoolExecutor(AT_ONCE) as threads:
        return list(threads.map(function, items))


MANIFEST = "manifest.json"
"""Its name in each run folder of the bucket."""
KEY_BYTES = 1024
"""Most bytes of a key in S3."""
NAME_BYTES = 255
"""Most bytes of a file name."""
GROWING = {FLEET_NAME, processes.CONFIG_NAME, processes.LOG_NAME, "metrics.jsonl", "train.log"}
"""Files that change all the time: they are taken even when they are newer than the manifest."""


class SupersededError(UserError):
    """Another machine writes this run folder now."""


@dataclass(frozen=True)
class Manifest:
    """`writer` is the machine that writes now; `files` maps names to SHA-256 digests in hex."""

    writer: str = ""
    files: dict[str, str] = field(default_factory=dict)


def read_manifest(bucket: Bucket) -> Manifest:
    """The manifest of a run folder; an empty one when it is missing or damaged, as others may write
    to the bucket. Raises UserError when the bucket cannot be read."""
    content = bucket.read(MANIFEST) or b"{}"  # outside of the block, which suppresses a UserError
    with suppress(UserError):
        manifest = from_json(content, Manifest)
        # its names become local paths: none may leave the folder or be a file and a folder
        folders = {str(folder) for name in manifest.files for folder in PurePosixPath(name).parents}
        if all(map(is_plain, manifest.files)) and not folders & manifest.files.keys():
            return manifest
    return Manifest()


def is_plain(name: str) -> bool:
    """Whether it names a file within the folder, as files and bucket keys can."""
    path = PurePosixPath(name)
    is_within = bool(path.parts) and not path.is_absolute() and ".." not in path.parts
    # Windows divides names at more characters
    is_one_spelling = str(path) == name and path.parts == Path(name).parts
    longest = max(len(os.fsencode(part)) for part in name.split("/"))
    is_short = len(os.fsencode(name)) <= KEY_BYTES and longest <= NAME_BYTES
    return is_within and is_one_spelling and is_short and "\0" not in name


class Digests:
    """SHA-256 digests of files, each computed again when the file's stat has changed."""

    def __init__(self) -> None:
        self._known: dict[Path, tuple[tuple, str]] = {}

    def of(self, path: Path) -> str:
        facts = path.stat()
        stamp = (facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns)
        known = self._known.get(path)
        if known is None or known[0] != stamp:
            known = (stamp, file_digest(path))
            self._known[path] = known
        return known[1]


class Mirror:
    """A local `folder` and its copy in `bucket`. Not thread-safe: one process uses it, one call at
    a time."""

    def __init__(self, bucket: Bucket, folder: Path):
        self.bucket = bucket
        self.folder = folder
        self.writer = uuid.uuid4().hex
        self.good: Mapping[str, str] | None = None  # what `pull` found to match the manifest
        self.digests = Digests()

    def pull(self) -> None:
        """Copy the bucket's files that match the manifest into the folder. A checkpoint with a bad
        file is left out."""
        files = read_manifest(self.bucket).files

        def is_good(name: str) -> bool:
            target = self.folder / name
            return self.bucket.download(name, target) and file_digest(target) == files[name]

        # fetch all, and note which arrived as the manifest says
        found = dict(zip(files, at_once(is_good, files)))
        self.good = {name: digest for name, digest in files.items() if found[name]}

        # a checkpoint with a bad file cannot be resumed: remove all of it
        last = run_folder.RunDir(self.folder).last_dir
        for name in files.keys() - self.good.keys():
            top = self.folder / PurePosixPath(name).parts[0]
            if top == last or run_folder.checkpoint_step(top) is not None:
                shutil.rmtree(top, ignore_errors=True)
            elif name not in GROWING:
                (self.folder / name).unlink(missing_ok=True)

    def claim(self) -> None:
        """From now on this process is the only writer. Bad files that `pull` has found are named no
        more."""
        self.write_manifest(read_manifest(self.bucket).files if self.good is None else self.good)

    def push(self) -> None:
        """Make the bucket equal to the folder.

        What is there is read anew, as a bucket may lose its files: without a manifest all are sent
        again. Raises SupersededError, and UserError for the bucket's errors.
        """
        manifest = read_manifest(self.bucket)
        if manifest.writer not in ("", self.writer):  # empty: it is missing or damaged
            raise SupersededError(f"{self.bucket.url}: another machine has taken it over.")

        # send what differs; the record last, as it says "done" only once the adapter has arrived
        digests = self.digests_here()
        changed = [name for name, digest in digests.items() if digest != manifest.files.get(name)]
        at_once(self.send, [name for name in changed if name != FLEET_NAME])
        if FLEET_NAME in changed:
            self.send(FLEET_NAME)

        # name only what has not changed while it was sent
        files = {}
        for name, digest in digests.items():
            if name in GROWING or self.digest(name) == digest:
                files[name] = digest
        self.write_manifest(files)

        # remove last: until now the old manifest may have named these
        gone = [name for name in manifest.files if name not in digests]
        at_once(self.bucket.remove, gone)

    def digests_here(self) -> dict[str, str]:
        """Name -> digest of the folder's files, without locks and temporary files."""
        digests = {}
        for path in sorted(self.folder.rglob("*")):
            name = path.relative_to(self.folder)
            is_lock = name.parts[-1] in (queue.LOCK_NAME, queue.OWNER_NAME)
            if is_lock or any(part.startswith(".") for part in name.parts):
                continue
            digest = self.digest(name.as_posix())
            if digest is not None:
                digests[name.as_posix()] = digest
        return digests

    def send(self, name: str) -> None:
        # a checkpoint was removed meanwhile; the next push notes it
        with suppress(FileNotFoundError):
            self.bucket.upload(self.folder / name, name)

    def digest(self, name: str) -> str | None:
        """None for what is no regular file, or is gone."""
        path = self.folder / name
        try:
            return self.digests.of(path) if stat.S_ISREG(path.lstat().st_mode) else None
        except OSError:
            return None

    def write_manifest(self, files: Mapping[str, str]) -> None:
        manifest = Manifest(self.writer, files)
        self.bucket.write(MANIFEST, json.dumps(asdict(manifest), indent=1).encode())
