"""Orders, parsed from a client's JSON, and the adapters that they may name.

Adapters are files of folders or of a bucket. A name from a client never becomes part of a path. A
listing is renewed after a short time, so that new files are seen without a restart. A changed file
gets a new version.
"""

import hashlib
import logging
import shutil
import tempfile
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from threading import Lock
from typing import Any

from dreambooth_moslora.disk.paths import find_asset
from dreambooth_moslora.disk.run_folder import (
    PUBLISHED_NAME,
    TOKENS_SUFFIX,
    files_by_name,
    is_of_run,
    named_files,
    run_files,
)
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.extras.cluster.bucket import Bucket, Digests
from dreambooth_moslora.generation.params import GenerationParams, check_steps, draw_seed
from dreambooth_moslora.values import parse_object


class RefusedError(UserError):
    """A refused request: `status` is the HTTP status, `retry_sec` is when to ask again."""

    def __init__(self, status: int, text: str, retry_sec: int | None = None) -> None:
        super().__init__(text)
        self.status = status
        self.retry_sec = retry_sec

    def __reduce__(self) -> tuple:
        # an exception is pickled by what its base class was given, the text alone
        return RefusedError, (self.status, str(self), self.retry_sec)


def too_late() -> RefusedError:
    """A new one each time: a raised error keeps the frames that it came through, and with them the
    order."""
    return RefusedError(504, "the picture was not drawn within the time limit; ask again later")


@dataclass(frozen=True)
class AdapterRef:
    """One version of an adapter's file. `place` is a path or URL; `version` changes with the
    content."""

    name: str
    place: str
    version: str

    @property
    def key(self) -> str:
        return f"{self.name}:{self.version}"


@dataclass(frozen=True)
class Order:
    """One picture to draw.

    params: what to draw
    sha256: adapters' names -> the digests that the client expects
    adapters: the files of those that `params` names, in its order
    seconds: how long it may wait and take
    """

    params: GenerationParams
    sha256: Mapping[str, str] = field(default_factory=dict)
    adapters: tuple[AdapterRef, ...] = ()
    seconds: float = 120.0

    @property
    def batch_key(self) -> tuple:
        """Orders with the same key can share a batch: they have the same adapters at the same
        scales, and the same size."""
        adapters = tuple(ref.key for ref in self.adapters)
        scales = tuple(scale for _, scale in self.params.adapters)
        return (adapters, scales, self.params.height_px, self.params.width_px)


@dataclass(frozen=True)
class Drawn:
    """A finished picture, and the state of the replica that drew it.

    png: the file's bytes, with the recipe
    replica: its name
    adapter_loads: since its start
    memory_bytes: its resident memory
    batch_size: orders of this picture's batch
    """

    png: bytes
    replica: str
    adapter_loads: int
    memory_bytes: int
    batch_size: int


def parse_order(body: bytes) -> Order:
    """Parse a JSON object with the fields of GenerationParams. `adapter` and `scale` may stand for
    one of `adapters`; `adapter_sha256` is as in a picture's recipe. A missing seed is drawn at
    random. Raises UserError."""
    # what is no field of GenerationParams
    values = parse_object(body)
    expected = values.pop("adapter_sha256", None) or {}
    is_map = isinstance(expected, dict)
    if not is_map or not all(isinstance(word, str) for word in expected.values()):
        raise UserError("adapter_sha256 must map names to digests")
    if values.get("seed") is None:
        values["seed"] = draw_seed(-1)

    # one adapter may be named without a list
    name = values.pop("adapter", None)
    scale = values.pop("scale", None)
    if name is not None:
        if values.get("adapters"):
            raise UserError("give either adapter or adapters")
        values["adapters"] = [[name, 1.0 if scale is None else scale]]
    elif scale is not None:
        raise UserError("scale belongs to an adapter; name it with adapter")

    # null stands for a field's default
    given = {key: value for key, value in values.items() if value is not None}
    params = GenerationParams.from_dict(given).apply_tags()
    if params.num_images != 1:
        raise UserError("a request draws one picture; send another one with the next seed")
    check_steps(params)
    return Order(params, expected)


logger = logging.getLogger(__name__)

FOLDER_SEC = 0.5
"""Age at which the listing of folders is renewed."""
BUCKET_SEC = 10.0
"""Age at which the listing of a bucket is renewed."""
SHARE = 9
"""A listing is kept this many times as long as it took: of many files, renewing it takes a tenth of
the time."""
MOST_FETCHED = 64
"""Files of a bucket that a replica keeps on its disk."""


class Catalogue:
    """Adapters by name. `find` raises RefusedError (404); `local` is the file's path here, fetched
    if needed."""

    def __init__(self, old_sec: float) -> None:
        """`old_sec`: the age at which the listing is made again."""
        self._old_sec = old_sec
        self._lock = Lock()
        self._listed = float("-inf")  # when the listing was made
        self._found: dict[str, Any] = {}
        self._took_sec = 0.0

    def names(self) -> list[str]:
        """Of all adapters that can be named now."""
        return list(self._list())

    def _list(self) -> dict[str, Any]:
        """The listing, made again when it is old. The last one is kept while a bucket cannot be
        reached."""
        with self._lock:
            started = time.monotonic()
            if started - self._listed > self._old_sec + SHARE * self._took_sec:
                try:
                    self._found = self._ask()
                except UserError as error:
                    logger.warning("%s", error)
                self._listed = time.monotonic()
                self._took_sec = self._listed - started
            return self._found


def open_catalogue(places: Sequence[str]) -> Catalogue:
    """Open a catalogue of folders, or of one bucket (a URL that fsspec knows). Raises UserError."""
    urls = [place for place in places if "://" in place]
    if urls and len(places) > 1:
        raise UserError("--adapters takes several folders or one bucket.")
    if urls:
        try:
            return BucketFolder(urls[0])
        except UserError as error:
            raise UserError(f"--adapters {error}") from error
    folders = [Path(find_asset(place)) for place in places]
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"--adapters {folder}: there is no such folder.")
    return Folders([folder.resolve() for folder in folders])


class Folders(Catalogue):
    """`.safetensors` files, finished runs, their best steps and checkpoints. A version is the
    file's SHA-256."""

    def __init__(self, folders: Sequence[Path]) -> None:
        super().__init__(FOLDER_SEC)
        self.folders = list(folders)
        self._digests = Digests()

    def find(self, name: str) -> AdapterRef:
        file = self._list().get(name)
        try:
            if file is not None:
                return AdapterRef(name, str(file), self._digests.of(file))
        except (OSError, UserError) as error:  # removed, or no longer readable
            logger.warning("The adapter %s cannot be read: %s", name, error)
        raise unknown(name)

    def local(self, ref: AdapterRef) -> Path:
        return Path(ref.place)

    def _ask(self) -> dict[str, Path]:
        """The files by name, from the disk."""
        files: list[Path] = []
        for folder in self.folders:
            # single files, then the runs in the folder, which may be a run itself
            found = sorted(folder.glob("*.safetensors"))
            files += [file for file in found if file.name != PUBLISHED_NAME]
            files += run_files([folder, *folder.glob("*/")])
        # without repeats: a run's best step is there twice
        return files_by_name(dict.fromkeys(files), self.folders)


class BucketFolder(Catalogue):
    """The adapters of a bucket. A version is a digest of what the bucket says of the file (ETag,
    size, time)."""

    def __init__(self, url: str) -> None:
        super().__init__(BUCKET_SEC)
        self.bucket = Bucket(url)
        self._listed = time.monotonic()
        self._found = self._ask()
        if not self._found:  # the listing of a mistyped name is empty
            raise UserError(f"{url}: holds no .safetensors file.")
        self._fetched: OrderedDict[str, Path] = OrderedDict()
        self._folder = tempfile.TemporaryDirectory(prefix="served-adapters-")

    def find(self, name: str) -> AdapterRef:
        ref = self._list().get(name)
        if ref is None:
            raise unknown(name)
        return ref

    def local(self, ref: AdapterRef) -> Path:
        with self._lock:
            if ref.key in self._fetched:
                self._fetched.move_to_end(ref.key)
            else:
                self._fetched[ref.key] = self._fetch(ref)
            # those that were asked for longest ago go
            while len(self._fetched) > MOST_FETCHED:
                _, oldest = self._fetched.popitem(last=False)
                shutil.rmtree(oldest.parent, ignore_errors=True)
            return self._fetched[ref.key]

    def _fetch(self, ref: AdapterRef) -> Path:
        """Download the adapter and the files of new tokens beside it. Raises RefusedError."""
        folder = Path(self._folder.name) / hashlib.sha256(ref.key.encode()).hexdigest()
        place = PurePosixPath(ref.place)
        try:
            found = self._paths()
            if ref.place not in found:
                raise unknown(ref.name)
            beside = [path for path in found if PurePosixPath(path).parent == place.parent]
            of_tokens = [path for path in beside if path.endswith(TOKENS_SUFFIX)]
            for path in [*of_tokens, ref.place]:
                file = folder / PurePosixPath(path).name
                size = found[path].get("size")  # None: this kind of place does not tell
                if not self.bucket.download(path, file) or size not in (None, file.stat().st_size):
                    raise RefusedError(
                        503, f"the adapter {ref.name} has changed while it was fetched", 5
                    )
        except RefusedError:
            raise
        except UserError as error:
            raise RefusedError(503, f"the adapter {ref.name} cannot be fetched now", 5) from error
        return folder / place.name

    def _ask(self) -> dict[str, AdapterRef]:
        """The files that `Folders` would find in such a folder, by the same names."""
        # single files, then those of runs
        listed = self._paths()
        folder = Path("/", self.bucket.root)
        own = [path for path in sorted(listed) if "/" not in path and path.endswith(".safetensors")]
        of_runs = [path for path in sorted(listed) if is_of_run(PurePosixPath(path))]
        paths = {folder / path: path for path in (*own, *of_runs)}

        # what the bucket says of a file changes with its content
        found = {}
        for name, file in named_files(paths, [folder]).items():
            place = paths[file]
            told = sorted((str(key), str(value)) for key, value in listed[place].items())
            version = hashlib.sha256(repr(told).encode()).hexdigest()
            found[name] = AdapterRef(name, place, version)
        return found

    def _paths(self) -> dict[str, dict]:
        """Files by their path below the bucket's folder. Raises UserError when they cannot be
        listed."""

        def list_all(path: str) -> dict[str, dict]:
            return self.bucket.files.find(path, maxdepth=3, detail=True)

        found = {}
        for path, facts in self.bucket.tried("", list_all).items():
            found[path.removeprefix(self.bucket.root).lstrip("/")] = facts
        return found


def unknown(name: str) -> RefusedError:
    return RefusedError(404, f"there is no adapter {name!s:.60}; GET /adapters lists them")
