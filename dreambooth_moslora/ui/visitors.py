"""Who uses the page, and what the server keeps for each visitor: photos as clean copies, pictures, uploads.

A login name comes first, then a random, HttpOnly cookie for each browser, then the session of one page (for API clients
without cookies). The cookie is sent with a link from another site (SameSite=Lax), or its owner would become a stranger.
"""

import hashlib
import os
import re
import secrets
import shutil
import tempfile
import threading
import time
import warnings
from collections import OrderedDict, deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gradio as gr
import PIL.Image
from starlette.requests import cookie_parser

from dreambooth_moslora.core import UserError, is_running, own_token, rename
from dreambooth_moslora.photos import photo_file as images
from dreambooth_moslora.photos.folder import MASK_SUFFIX, sidecar_of, sidecars_of
from dreambooth_moslora.photos.photo_file import grey_mask
from dreambooth_moslora.settings.sources import FoundRecipe

PHOTO_TYPES = [".jpg", ".jpeg", ".png", ".webp", ".heic", ".heif", ".avif", ".bmp", ".tif", ".tiff"]
MAX_PHOTOS = 50
MAX_PHOTO_BYTES = 30 * 1024**2
MAX_SIDE_PX = 4096
MAX_PIXELS = 120 * 10**6
MAX_PIXELS_TOGETHER = 600 * 10**6
"""Limit for all files of a request: 50 photos of 12 megapixels. A core takes about 30 megapixels a second."""
ONE_AT_A_TIME = threading.Lock()
"""Lock over all visitors: decoding a photo of 120 megapixels takes up to a gigabyte."""


def take_photos(files: list[str], folder: Path, *, keep: bool = False) -> list[str]:
    """Copy photos into an empty `folder` as photo_01.png …, masks as photo_01.mask.png …; returns remarks. With `keep`
    they come after those that are there. The folder is replaced atomically: two tabs may send theirs at once. Raises
    UserError when no file is usable."""
    named_masks = [file for file in map(Path, files) if (sidecar_of(file) or ("", ""))[1] == MASK_SUFFIX]
    masks = {stem: file for (stem, _), file in sidecars_of(named_masks).items()}
    photos = [file for file in map(Path, files) if file not in named_masks]
    if not photos:
        raise UserError("add some photos of your subject first")
    kept = len(kept_photos(folder)) if keep else 0
    if (count := kept + len(photos)) > MAX_PHOTOS:
        raise UserError(f"{count} photos are too many; {MAX_PHOTOS} at most, and 3 to 10 good ones are enough")
    pixels, most = sum(map(pixels_of, [*photos, *masks.values()])), MAX_PIXELS_TOGETHER // 10**6
    if pixels > MAX_PIXELS_TOGETHER:
        raise UserError(f"the photos have {pixels / 1e6:.0f} megapixels together; at most {most} are taken at a time")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{folder.name}-", dir=folder.parent) as scratch:
        new = Path(scratch) / folder.name
        shutil.copytree(folder, new) if kept else new.mkdir()
        remarks = copy_all(photos, masks, new, kept)
        is_empty = len(kept_photos(new)) == kept
        if not (kept and is_empty):
            with ONE_AT_A_TIME:
                shutil.rmtree(folder, ignore_errors=True)
                rename(new, folder)
    if is_empty:
        raise UserError(f"none of the files is a usable photo: {remarks[0]}")
    return remarks


def kept_photos(folder: Path) -> list[Path]:
    """The clean copies in their order, without the masks."""
    return sorted(path for path in folder.glob("photo_*.png") if "." not in path.stem)


def remove_photos(folder: Path, gone: Collection[Path]) -> None:
    """Delete these photos with their masks, and number the others anew."""
    with ONE_AT_A_TIME:
        for photo in gone:
            for file in folder.glob(f"{photo.stem}.*"):
                file.unlink()
        for number, photo in enumerate(kept_photos(folder), 1):
            for file in folder.glob(f"{photo.stem}.*"):
                file.rename(folder / f"photo_{number:02d}{file.name.removeprefix(photo.stem)}")


def copy_all(photos: list[Path], masks: dict[str, Path], folder: Path, taken: int = 0) -> list[str]:
    """Write clean copies after the `taken` photos of the folder, beside them their masks in plain grey (by the photo's
    stem); returns the remarks."""
    remarks = []
    for photo in photos:
        try:
            with ONE_AT_A_TIME:
                clean, was_turned = clean_copy(photo)
        except UserError as error:
            remarks.append(str(error))
            continue
        taken += 1
        clean.save(folder / f"photo_{taken:02d}.png")
        remarks += [f"photo {taken}: rotated by EXIF, turned upright"] if was_turned else []
        if mask := masks.get(photo.stem):
            try:
                with ONE_AT_A_TIME:
                    check_size(mask)
                    grey_mask(images.open_image(mask, MAX_SIDE_PX)).save(folder / f"photo_{taken:02d}.mask.png")
            except (UserError, images.UnreadableImageError) as error:
                remarks.append(str(error) if isinstance(error, UserError) else f"{mask.name}: {error}")
    stems = {photo.stem for photo in photos}
    return remarks + [f"{mask.name}: a mask of no photo that is here" for s, mask in masks.items() if s not in stems]


def clean_copy(file: Path) -> tuple[PIL.Image.Image, bool]:
    """The upright pixels, at most 4096 px a side, and whether EXIF had turned them. Raises UserError."""
    check_size(file)
    try:
        opened = images.open_image(file, MAX_SIDE_PX)
        clean, alpha = images.to_rgb(opened), images.alpha_of(opened)
    except images.UnreadableImageError as error:
        raise UserError(f"{file.name}: {error}") from error
    if alpha is not None:
        clean.putalpha(alpha)
    bare = PIL.Image.new(clean.mode, clean.size)
    bare.paste(clean)
    return bare, images.is_rotated(opened)


def check_size(file: Path) -> None:
    """Raises UserError for a file above 30 MiB, or above 120 megapixels by its header; nothing is decoded."""
    if file.stat().st_size > MAX_PHOTO_BYTES:
        raise UserError(f"{file.name} is larger than {MAX_PHOTO_BYTES // 2**20} MiB")
    if (pixels := pixels_of(file)) > MAX_PIXELS:
        raise UserError(f"{file.name} has {pixels / 1e6:.0f} megapixels; at most {MAX_PIXELS // 10**6} are read")


def pixels_of(file: Path) -> int:
    """Pixels by the file's header; 0 for what is no image, as `open_image` explains later. Raises UserError."""
    images.register_heif()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with PIL.Image.open(file, formats=images.FORMATS) as image:
                return image.width * image.height
    except PIL.Image.DecompressionBombError as error:
        raise UserError(f"{file.name} has too many pixels") from error
    except (OSError, ValueError, SyntaxError):
        return 0


COOKIE = "moslora_visitor"
SHORTEST_SECRET, FEWEST_LETTERS = 32, 10
"""A cookie with fewer characters, or fewer different ones, can be guessed and is ignored."""
MAX_VISITORS = 200
KEPT_SEC = 3600
LONGEST_KEPT_SEC = 7 * 24 * 3600
PREFIX = "moslora-app-"
FOLDER = re.compile(rf"{PREFIX}(?P<pid>[0-9]{{1,9}})-(?P<token>[0-9a-f]{{8}})-[a-z0-9_]+")
"""A server's folder. Any user of the machine may give another name in the folder of temporary files."""
HISTORY_LENGTH = 48
ONE_YEAR_SEC = 365 * 24 * 3600


@dataclass(frozen=True)
class Picture:
    """A finished PNG of this visitor."""

    path: Path
    caption: str


@dataclass
class Visitor:
    """`id` is a hash of the secret, safe to write to disk. `root` holds the visitor's own files, `recipes` what was
    read from files that are not kept. `address` is where the last request came from; "" with a login."""

    id: str
    root: Path
    address: str = ""
    history: deque[Picture] = field(default_factory=lambda: deque(maxlen=HISTORY_LENGTH))
    uploads: dict[str, Path] = field(default_factory=dict)
    recipes: dict[str, FoundRecipe] = field(default_factory=dict)
    changing: threading.RLock = field(default_factory=threading.RLock, compare=False)  # its photos
    seen_at: float = field(default_factory=time.monotonic)

    @property
    def folder(self) -> Path:
        """`root`, which is made when needed."""
        self.root.mkdir(parents=True, exist_ok=True)
        return self.root

    @property
    def photos_dir(self) -> Path:
        """Clean copies of the photos that were added last."""
        return self.root / "photos"

    @property
    def given_photos(self) -> Path:
        """`photos_dir`. Raises UserError while no photo is in it."""
        if not kept_photos(self.photos_dir):
            raise UserError("add some photos of your subject first")
        return self.photos_dir

    def remember(self, picture: Picture) -> None:
        """Add to the history, newest first; when it is full, the oldest file is deleted."""
        if len(self.history) == self.history.maxlen:
            self.history[-1].path.unlink(missing_ok=True)
        self.history.appendleft(picture)


class Visitors:
    """All visitors. Who is away for a week is forgotten with all files; beyond 200 first who has none, then who is
    away longest, for an hour at least."""

    def __init__(self) -> None:
        home = Path(os.environ.get("GRADIO_TEMP_DIR") or tempfile.gettempdir())  # of all servers' folders
        for folder in home.glob(f"{PREFIX}*"):  # those of servers that were killed go
            named = FOLDER.fullmatch(folder.name)
            if named and not is_running(int(named["pid"]), named["token"]):
                shutil.rmtree(folder, ignore_errors=True)
        home.mkdir(parents=True, exist_ok=True)
        prefix = f"{PREFIX}{(pid := os.getpid())}-{own_token(pid)}-"
        self.root = Path(tempfile.mkdtemp(prefix=prefix, dir=home)).resolve()
        self._known: OrderedDict[str, Visitor] = OrderedDict()  # by their last visit, the oldest first
        self._lock = threading.Lock()

    def of(self, request: gr.Request) -> Visitor:
        identity, now = visitor_id(request), time.monotonic()
        with self._lock:
            while self._known and next(iter(self._known.values())).seen_at < now - LONGEST_KEPT_SEC:
                shutil.rmtree(self._known.popitem(last=False)[1].root, ignore_errors=True)
            if identity not in self._known:
                if (spare := len(self._known) - MAX_VISITORS + 1) > 0:
                    idle = [
                        i for i, one in self._known.items() if not one.root.exists() or now - one.seen_at > KEPT_SEC
                    ]
                    idle.sort(key=lambda i: self._known[i].root.exists())
                    for old in idle[:spare]:
                        shutil.rmtree(self._known.pop(old).root, ignore_errors=True)
                self._known[identity] = Visitor(identity, self.root / secrets.token_hex(16))
            self._known.move_to_end(identity)
            visitor = self._known[identity]
            visitor.seen_at = now
            visitor.address = "" if getattr(request, "username", None) else address_of(request)
            return visitor

    def close(self) -> None:
        shutil.rmtree(self.root, ignore_errors=True)


def visitor_id(request: gr.Request) -> str:
    """A hash of what identifies the visitor; two visitors share it only if they share the secret."""
    if name := getattr(request, "username", None):
        secret = f"name:{name}"
    elif cookie := secret_in(getattr(request, "cookies", None) or {}):
        secret = f"cookie:{cookie}"
    else:
        secret = f"session:{request.session_hash or secrets.token_hex(16)}"
    return hashlib.sha256(secret.encode()).hexdigest()


def address_of(request: gr.Request) -> str:
    client = getattr(request, "client", None)
    return client.host if client else ""


def secret_in(cookies: Mapping[str, str]) -> str:
    """The visitor's secret; empty when it is missing or can be guessed."""
    secret = cookies.get(COOKIE, "")
    return secret if len(secret) >= SHORTEST_SECRET and len(set(secret)) >= FEWEST_LETTERS else ""


def header_of(scope: dict, wanted: bytes) -> bytes:
    return next((value for name, value in scope.get("headers", ()) if name == wanted), b"")


def cookie_of(scope: dict) -> str:
    """`secret_in` the cookies of a request."""
    return secret_in(cookie_parser(header_of(scope, b"cookie").decode("latin1")))


class Layer:
    """ASGI middleware around `app`: `answer` handles what is HTTP."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        await (self.answer if scope["type"] == "http" else self.app)(scope, receive, send)


class VisitorCookie(Layer):
    """The first answer to a browser sets the cookie."""

    async def answer(self, scope: dict, receive: Any, send: Any) -> None:
        if scope["path"] != "/" or cookie_of(scope):
            await self.app(scope, receive, send)
            return

        secret = secrets.token_urlsafe(24)
        new = f"{COOKIE}={secret}; Path=/; Max-Age={ONE_YEAR_SEC}; HttpOnly; SameSite=Lax"

        async def send_with_cookie(message: dict) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), (b"set-cookie", new.encode())]
            await send(message)

        await self.app(scope, receive, send_with_cookie)
