"""A run folder and its copy in a bucket. One machine at a time writes the copy.

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
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath

from dreambooth_moslora.core.digests import file_digest
from dreambooth_moslora.core.errors import UserError
from dreambooth_moslora.core.run_files.run_folder import RunDir, checkpoint_step
from dreambooth_moslora.core.run_files.training_process import CONFIG_NAME, LOG_NAME
from dreambooth_moslora.fleet.bucket import Bucket, at_once
from dreambooth_moslora.fleet.records import FLEET_NAME
from dreambooth_moslora.training.run_folders.run_lock import LOCK_NAME

__all__ = ["MANIFEST", "Manifest", "Mirror", "SupersededError", "read_manifest"]

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
