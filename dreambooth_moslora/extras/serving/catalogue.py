"""Orders, parsed from a client's JSON, and the adapters that they may name.

Adapters are files of folders. A name from a client never becomes part of a path. A listing is
renewed after a short time, so that new files are seen without a restart. A changed file gets a new
version.
"""

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

from dreambooth_moslora.disk.contents import hash_file, read_stamp
from dreambooth_moslora.disk.paths import find_asset
from dreambooth_moslora.disk.run_folder import PUBLISHED_NAME, list_run_adapters, map_adapter_names
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.generation.image_params import GenerationParams, check_steps, resolve_seed


class RefusedError(UserError):
    """Refused request: `status` is the HTTP status, `retry_sec` is when to ask again."""

    def __init__(self, status: int, text: str, retry_sec: int | None = None) -> None:
        super().__init__(text)
        self.status = status
        self.retry_sec = retry_sec

    def __reduce__(self) -> tuple:
        # an exception is pickled by what its base class was given, the text alone
        return RefusedError, (self.status, str(self), self.retry_sec)


def build_timeout_error() -> RefusedError:
    """Build a new error each time: a raised error keeps the frames that it came through, and with
    them the order."""
    return RefusedError(504, "the picture was not drawn within the time limit; ask again later")


@dataclass(frozen=True)
class AdapterRef:
    """Version of an adapter's file. `place` is its path; `version` changes with the content."""

    name: str
    place: str
    version: str

    @property
    def key(self) -> str:
        return f"{self.name}:{self.version}"


@dataclass(frozen=True)
class ImageOrder:
    """Order of one picture.

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


def parse_order(body: bytes) -> ImageOrder:
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
        values["seed"] = resolve_seed(-1)

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
    fields = {key: value for key, value in values.items() if value is not None}
    params = GenerationParams.from_dict(fields).apply_tags()
    if params.num_images != 1:
        raise UserError("a request draws one picture; send another one with the next seed")
    check_steps(params)
    return ImageOrder(params, expected)


logger = logging.getLogger(__name__)

MIN_LISTING_AGE_SEC = 0.5
"""Age at which the listing is renewed."""
LISTING_TIME_RATIO = 9
"""A listing is kept this many times as long as it took: of many files, renewing it takes a tenth of
the time."""


class Catalogue:
    """Adapters of some folders by name: `.safetensors` files, finished runs, their best steps and
    checkpoints. A version is the file's SHA-256."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self.folders = list(folders)
        self._lock = Lock()
        self._listed_sec = float("-inf")  # when the listing was made
        self._took_sec = 0.0
        self._files: dict[str, Path] = {}
        self._digests: dict[Path, tuple[tuple, str]] = {}  # file -> its stat and digest

    def list_names(self) -> list[str]:
        """List all adapters that a request can name now."""
        return list(self._get_files())

    def find(self, name: str) -> AdapterRef:
        """Raise RefusedError (404)."""
        file = self._get_files().get(name)
        try:
            if file is not None:
                return AdapterRef(name, str(file), self._get_digest(file))
        except (OSError, UserError) as error:  # removed, or no longer readable
            logger.warning("The adapter %s cannot be read: %s", name, error)
        raise RefusedError(404, f"there is no adapter {name!s:.60}; GET /adapters lists them")

    def _get_digest(self, file: Path) -> str:
        """Computed again when the file's stat has changed."""
        stamp = read_stamp(file)
        stamp_and_digest = self._digests.get(file)
        if stamp_and_digest is None or stamp_and_digest[0] != stamp:
            stamp_and_digest = (stamp, hash_file(file))
            self._digests[file] = stamp_and_digest
        return stamp_and_digest[1]

    def _get_files(self) -> dict[str, Path]:
        """Return the files by name, from the disk when the last listing is old."""
        with self._lock:
            started = time.monotonic()
            if (
                started - self._listed_sec
                > MIN_LISTING_AGE_SEC + LISTING_TIME_RATIO * self._took_sec
            ):
                self._files = self._scan_folders()
                self._listed_sec = time.monotonic()
                self._took_sec = self._listed_sec - started
            return self._files

    def _scan_folders(self) -> dict[str, Path]:
        files: list[Path] = []
        for folder in self.folders:
            # single files, then the runs in the folder, which may be a run itself
            weights = sorted(folder.glob("*.safetensors"))
            files += [file for file in weights if file.name != PUBLISHED_NAME]
            files += list_run_adapters([folder, *folder.glob("*/")])
        # without repeats: a run's best step is there twice
        return map_adapter_names(dict.fromkeys(files), self.folders)


def open_catalogue(places: Sequence[str]) -> Catalogue:
    """Open the catalogue of these folders. Raises UserError for one that does not exist."""
    folders = [Path(find_asset(place)) for place in places]
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"--adapters {folder}: there is no such folder.")
    return Catalogue([folder.resolve() for folder in folders])


def parse_object(body: bytes) -> dict[str, Any]:
    """Raise UserError unless the bytes are UTF-8 and a JSON object, without NaN and not too deeply
    nested."""
    try:
        values = json.loads(body.decode("utf-8"), parse_constant=refuse_constant)
    except (ValueError, RecursionError) as error:
        raise UserError("the body is not valid JSON") from error
    if not isinstance(values, dict):
        raise UserError('the body must be a JSON object like {"prompt": "a dog"}')
    return values


def refuse_constant(word: str) -> None:
    """For `json.loads`, which would take NaN and Infinity. Raises ValueError."""
    raise ValueError(f"{word} is not a JSON number")
