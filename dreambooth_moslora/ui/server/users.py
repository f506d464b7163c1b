"""Identifies users by a random, HttpOnly cookie for each browser, and holds what the server keeps for each of them.

A login name comes first, then the cookie, then the session of one page (for API clients without cookies). The
cookie is sent with a link from another site (SameSite=Lax); otherwise that link would make its owner a
stranger.
"""

import hashlib
import os
import secrets
import shutil
import tempfile
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr
import psutil
from starlette.requests import cookie_parser

from dreambooth_moslora.ui.server.photo_uploads import kept_photos

if TYPE_CHECKING:
    from dreambooth_moslora.core.config.like import FoundRecipe

__all__ = ["COOKIE", "Picture", "Visitor", "VisitorCookie", "Visitors", "address_of", "secret_in", "visitor_id"]

COOKIE = "moslora_visitor"
SHORTEST_SECRET, FEWEST_LETTERS = 32, 10
"""A cookie with fewer characters, or fewer different ones, can be guessed and is ignored."""
MAX_VISITORS = 200
KEPT_SEC = 3600
LONGEST_KEPT_SEC = 7 * 24 * 3600
PREFIX = "moslora-app-"
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
    recipes: dict[str, "FoundRecipe"] = field(default_factory=dict)
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
    def can_be_forgotten(self) -> bool:
        """Whether nothing is stored, or the visitor has been away for an hour."""
        return not self.root.exists() or time.monotonic() - self.seen_at > KEPT_SEC

    @property
    def has_photos(self) -> bool:
        return bool(kept_photos(self.photos_dir))

    def remember(self, picture: Picture) -> None:
        """Add to the history, newest first; when it is full, the oldest file is deleted."""
        if len(self.history) == self.history.maxlen:
            self.history[-1].path.unlink(missing_ok=True)
        self.history.appendleft(picture)


class Visitors:
    """All visitors. A visitor who is away for a week is forgotten with all files.

    Beyond 200 the least recent are forgotten too, those without files first.
    """

    def __init__(self) -> None:
        sweep()
        home().mkdir(parents=True, exist_ok=True)
        self.root = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-", dir=home())).resolve()
        self._known: OrderedDict[str, Visitor] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, request: gr.Request) -> Visitor:
        identity = visitor_id(request)
        with self._lock:
            self._forget_long_gone()
            if identity not in self._known:
                self._forget_old()
                self._known[identity] = Visitor(identity, self.root / secrets.token_hex(16))
            self._known.move_to_end(identity)
            visitor = self._known[identity]
            visitor.seen_at = time.monotonic()
            visitor.address = "" if getattr(request, "username", None) else address_of(request)
            return visitor

    def _forget_long_gone(self) -> None:
        """Visitors are ordered by their last visit, the oldest first."""
        end = time.monotonic() - LONGEST_KEPT_SEC
        while self._known and next(iter(self._known.values())).seen_at < end:
            shutil.rmtree(self._known.popitem(last=False)[1].root, ignore_errors=True)

    def _forget_old(self) -> None:
        spare = len(self._known) - MAX_VISITORS + 1
        if spare <= 0:
            return
        for identity in [i for i, visitor in self._known.items() if visitor.can_be_forgotten][:spare]:
            shutil.rmtree(self._known.pop(identity).root, ignore_errors=True)

    def close(self) -> None:
        shutil.rmtree(self.root, ignore_errors=True)


def home() -> Path:
    """The parent of the folders of all servers."""
    return Path(os.environ.get("GRADIO_TEMP_DIR") or tempfile.gettempdir())


def sweep() -> None:
    """Remove visitors' files of servers that were killed."""
    for folder in home().glob(f"{PREFIX}*"):
        pid = folder.name.removeprefix(PREFIX).partition("-")[0]
        if not (pid.isdigit() and psutil.pid_exists(int(pid))):
            shutil.rmtree(folder, ignore_errors=True)


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
    """The network address that the request came from."""
    client = getattr(request, "client", None)
    return client.host if client else ""


def secret_in(cookies: Mapping[str, str]) -> str:
    """The visitor's secret; empty when it is missing or can be guessed."""
    secret = cookies.get(COOKIE, "")
    return secret if len(secret) >= SHORTEST_SECRET and len(set(secret)) >= FEWEST_LETTERS else ""


class VisitorCookie:
    """ASGI middleware: the first answer to a browser sets the cookie."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["path"] != "/" or _has_cookie(scope):
            await self.app(scope, receive, send)
            return

        async def send_with_cookie(message: dict) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), (b"set-cookie", _new_cookie().encode())]
            await send(message)

        await self.app(scope, receive, send_with_cookie)


def _has_cookie(scope: dict) -> bool:
    header = next((value.decode("latin1") for name, value in scope["headers"] if name == b"cookie"), "")
    return bool(secret_in(cookie_parser(header)))


def _new_cookie() -> str:
    return f"{COOKIE}={secrets.token_urlsafe(24)}; Path=/; Max-Age={ONE_YEAR_SEC}; HttpOnly; SameSite=Lax"
