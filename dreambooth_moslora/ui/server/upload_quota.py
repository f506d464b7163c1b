"""Limits the disk space of uploads: a visitor's oldest uploads are deleted when the total is too large."""

import json
import shutil
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path
from typing import Any

from gradio.utils import get_upload_folder
from starlette.requests import cookie_parser
from starlette.responses import PlainTextResponse

from dreambooth_moslora.ui.server.body_limit import UPLOAD, header_of, promised_bytes
from dreambooth_moslora.ui.server.users import secret_in

__all__ = ["DISK_RESERVE_BYTES", "MAX_BYTES_EACH", "UploadQuota"]

MAX_BYTES_EACH = 2 * 1024**3
"""Four of the longest uploads, or 50 of the largest photos."""
DISK_RESERVE_BYTES = 1024**3
"""Space that uploads must leave free, since a visitor can invent further cookies."""
MAX_ANSWER_BYTES = 1024**2


class UploadQuota:
    """ASGI middleware: records what each visitor has uploaded; answers 507 when the upload would fill the disk."""

    def __init__(self, app: Any) -> None:
        self.app = app
        self._stored: dict[str, OrderedDict[Path, int]] = {}

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["path"].rstrip("/") != UPLOAD:
            await self.app(scope, receive, send)
        elif free_bytes() - promised_bytes(scope) < DISK_RESERVE_BYTES:
            await PlainTextResponse("the server's disk is almost full; no upload is taken", 507)(scope, receive, send)
        else:
            answer = bytearray()
            await self.app(scope, receive, _noted(send, answer))
            self._note(_owner_of(scope), _paths_in(answer))

    def _note(self, owner: str, paths: list[Path]) -> None:
        mine = self._stored.setdefault(owner, OrderedDict())
        for path in paths:
            with suppress(OSError):
                mine[path] = path.stat().st_size
                mine.move_to_end(path)
        while sum(mine.values()) > MAX_BYTES_EACH and len(mine) > max(1, len(paths)):
            oldest, _ = mine.popitem(last=False)
            if not any(oldest in theirs for theirs in self._stored.values()):
                oldest.unlink(missing_ok=True)


def free_bytes() -> int:
    folder = Path(get_upload_folder())
    return shutil.disk_usage(next(place for place in (folder, *folder.parents) if place.exists())).free


def _noted(send: Any, answer: bytearray) -> Any:
    """`send` that copies a successful answer's text."""
    is_good = False

    async def noted(message: dict) -> None:
        nonlocal is_good
        is_good = message["status"] == 200 if message["type"] == "http.response.start" else is_good
        if is_good and len(answer) < MAX_ANSWER_BYTES:
            answer.extend(message.get("body", b""))
        await send(message)

    return noted


def _paths_in(answer: bytearray) -> list[Path]:
    try:
        return [Path(path) for path in json.loads(answer)] if answer else []
    except (ValueError, TypeError):
        return []


def _owner_of(scope: dict) -> str:
    """The owner by the cookie, else by the address: an upload names no session."""
    cookie = secret_in(cookie_parser(header_of(scope, b"cookie").decode("latin1")))
    return f"cookie:{cookie}" if cookie else f"address:{(scope.get('client') or ('',))[0]}"
