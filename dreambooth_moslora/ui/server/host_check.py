"""A page on the loopback answers only to its own names, and no page answers to another site's page.

Otherwise any site could point a name of its own at 127.0.0.1 and use the page through a visitor's browser (DNS
rebinding), or read and send with the login that the browser holds.
"""

import re
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

from starlette.responses import PlainTextResponse

__all__ = ["LOOPBACK", "Origin", "TrustedHosts", "origins_of", "outermost"]

LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
DEFAULT_PORTS = {"http": 80, "https": 443}
HEADERS = (b"host", b"origin", b"x-forwarded-host", b"sec-fetch-site")
FOREIGN_SITES = ("cross-site", "same-site")
"""Values of Sec-Fetch-Site: "same-site" is another port or another name of the same domain."""
OF_ANSWERS = (b"connection", b"content-type", b"content-length", b"cache-control")
"""Headers that an answer may have in common with its request."""
FRAMES = (b"content-security-policy", b"frame-ancestors 'self'")
"""No other site may show the page in a frame, where users could be tricked into clicks."""
Origin = tuple[str, str, int]
"""Scheme, host name and port of a page: pages that differ in one of them are different sites."""
Lifespan = Callable[[Any], AbstractAsyncContextManager]
REFUSED = "another site may not ask here; behind a proxy, start the app with --allowed_host and the page's address"
SAME_SITE_NONE = re.compile(rb"samesite=none", re.IGNORECASE)


class TrustedHosts:
    """ASGI middleware: answers 421 for a foreign host name, 403 for requests from another site's page.

    `hosts` are the only names that the page answers to; None means all. A page of one of the `allowed` origins
    may send requests, whatever Host the proxy in front passes on. Cookies that a browser would send with
    another site's requests become SameSite=Lax.
    """

    def __init__(self, app: Any, hosts: Collection[str] | None, allowed: Collection[Origin] = ()) -> None:
        self.app, self.hosts, self.allowed = app, hosts, allowed
        self.names = {name for _, name, _ in allowed}

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
        elif refusal := self._refusal(scope):
            await refusal(scope, receive, send)
        else:
            named = [(name, value) for name, value in scope["headers"] if self._may_pass(name, value)]
            await self.app(scope | {"headers": named}, receive, _cleaned(send, scope["headers"]))

    def _may_pass(self, name: bytes, value: bytes) -> bool:
        """gradio puts X-Forwarded-Host into addresses that all users get: only known names and real ports pass."""
        if name != b"x-forwarded-host":
            return True
        origin = _origin(f"https://{value.decode('latin1')}")
        return origin is not None and origin[1] in self.names

    def _refusal(self, scope: dict) -> PlainTextResponse | None:
        headers = {name: value.decode("latin1") for name, value in scope["headers"] if name in HEADERS}
        host, origin = headers.get(b"host", ""), headers.get(b"origin")
        if self.hosts is not None and _hostname(f"//{host}") not in self.hosts:
            return PlainTextResponse("unknown host; start the app with --allowed_host for this name", 421)
        if origin is not None and not self._is_own(origin, (host, headers.get(b"x-forwarded-host", host))):
            return PlainTextResponse(REFUSED, 403)
        if scope["path"].rstrip("/") == "/logout" and headers.get(b"sec-fetch-site") in FOREIGN_SITES:
            return PlainTextResponse("another site may not end a login", 403)
        return None

    def _is_own(self, origin: str, hosts: tuple[str, ...]) -> bool:
        """Host and X-Forwarded-Host give the page's own name and port: a browser does not let another site's page
        set them. They do not tell the scheme; for an allowed name it is one of those that are allowed."""
        asked, scheme = _origin(origin), origin.partition("://")[0]
        if asked is None or asked in self.allowed:
            return asked is not None
        is_named = asked in {_origin(f"{scheme}://{host}") for host in hosts}
        return is_named and (asked[1] not in self.names or asked[:2] in {known[:2] for known in self.allowed})


def outermost(hosts: Collection[str] | None, allowed: Collection[Origin]) -> Lifespan:
    """A lifespan that puts TrustedHosts around everything else, including gradio's own middleware.

    Gradio adds its own outside of any given one, and would itself answer a foreign page's preflight.
    """

    @asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        app.middleware_stack = TrustedHosts(app.middleware_stack, hosts, allowed)
        yield

    return lifespan


def _cleaned(send: Any, asked: list[tuple[bytes, bytes]]) -> Any:
    """`send` with lax cookies, and without the request's own headers: when a part of a file is requested,
    gradio repeats them, including the HttpOnly cookie."""
    own = {(name.lower(), value) for name, value in asked if name.lower() not in OF_ANSWERS}

    async def send_cleaned(message: dict) -> None:
        if message["type"] == "http.response.start":
            headers = [_lax(name, value) for name, value in message.get("headers", ())]
            message["headers"] = [header for header in headers if (header[0].lower(), header[1]) not in own]
            message["headers"].append(FRAMES)
        await send(message)

    return send_cleaned


def _lax(name: bytes, value: bytes) -> tuple[bytes, bytes]:
    return name, SAME_SITE_NONE.sub(b"SameSite=Lax", value) if name.lower() == b"set-cookie" else value


def _hostname(url: str) -> str | None:
    """Lower case, without the port; None when there is none."""
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None


def _origin(url: str) -> Origin | None:
    """The port is by default the scheme's; None for an invalid address."""
    try:
        parts = urlsplit(url)
        port = parts.port or DEFAULT_PORTS[parts.scheme]
        return (parts.scheme, parts.hostname, port) if parts.hostname else None
    except (ValueError, KeyError):
        return None


def origins_of(text: str) -> set[Origin]:
    """What a host name or an address means: without a scheme http and https, without a port the scheme's own.
    Empty for an invalid one."""
    urls = [text] if "//" in text else [f"{scheme}://{text}" for scheme in DEFAULT_PORTS]
    return {_origin(url) for url in urls} - {None}
