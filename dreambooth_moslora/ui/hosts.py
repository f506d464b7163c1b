"""A page on the loopback answers only to its own names, and takes nothing that another site's page sends it.

Without this, any site could point a name of its own at 127.0.0.1 and use the page through a visitor's browser (DNS
rebinding), or post files to it.
"""

from typing import Any
from urllib.parse import urlsplit

from starlette.responses import PlainTextResponse

__all__ = ["LOOPBACK", "OwnHosts", "hostname"]

LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
SAFE_METHODS = ("GET", "HEAD", "OPTIONS")


class OwnHosts:
    """ASGI middleware: 421 for a request to a foreign name, 403 for what a foreign page posts."""

    def __init__(self, app: Any, hosts: frozenset[str]) -> None:
        self.app, self.hosts = app, hosts

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        refusal = self._refusal(scope) if scope["type"] == "http" else None
        await (refusal or self.app)(scope, receive, send)

    def _refusal(self, scope: dict) -> PlainTextResponse | None:
        headers = {name: value.decode("latin1") for name, value in scope["headers"] if name in (b"host", b"origin")}
        if hostname("//" + headers.get(b"host", "")) not in self.hosts:
            return PlainTextResponse("unknown host; start the app with --allowed_host for this name", 421)
        origin = headers.get(b"origin")
        if origin is not None and scope["method"] not in SAFE_METHODS and hostname(origin) not in self.hosts:
            return PlainTextResponse("another site may not send anything here", 403)
        return None


def hostname(url: str) -> str | None:
    """Lower case, without the port; None when there is none."""
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None
