"""No request fills the memory: only an upload, which gradio writes to the disk under its own limit, may be long."""

from typing import Any

from starlette.responses import PlainTextResponse

__all__ = ["MAX_BODY_BYTES", "ShortBodies"]

UPLOAD = "/gradio_api/upload"
MAX_BODY_BYTES = 4 * 1024**2
"""Far more than any form of the page; what is parsed takes several times as much."""


class ShortBodies:
    """ASGI middleware: 413 for a body that says it is longer; one that is longer without a word is cut off."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["path"] == UPLOAD:
            await self.app(scope, receive, send)
        elif _promised_bytes(scope) > MAX_BODY_BYTES:
            await PlainTextResponse("too long; files are sent to /upload", 413)(scope, receive, send)
        else:
            await self.app(scope, _counted(receive), send)


def _promised_bytes(scope: dict) -> int:
    promised = next((value for name, value in scope["headers"] if name == b"content-length"), b"")
    return int(promised) if promised.isdigit() else 0


def _counted(receive: Any) -> Any:
    """`receive` until MAX_BODY_BYTES have come; then the sender counts as gone."""
    taken = 0

    async def counted() -> dict:
        nonlocal taken
        message = await receive()
        taken += len(message.get("body", b""))
        return message if taken <= MAX_BODY_BYTES else {"type": "http.disconnect"}

    return counted
