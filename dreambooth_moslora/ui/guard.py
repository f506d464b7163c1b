"""What a request may be: its host, the site that it comes from, and on a public page its length.

No page answers to another site's page, and one on the loopback only to its own names: otherwise any
site could point a name of its own at 127.0.0.1 (DNS rebinding), or use the login that the browser
holds.
"""

import json
import re
import sys
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager, suppress
from typing import Any
from urllib.parse import urlsplit

import gradio as gr
from gradio.utils import LRUCache
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from uvicorn.config import HTTP_PROTOCOLS
from uvicorn.protocols.http.h11_impl import H11Protocol

from dreambooth_moslora.errors import UserError

LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
"""Names of this machine that only its own programs can reach."""
DEFAULT_PORTS = {"http": 80, "https": 443}
"""Scheme -> the port of an address that names none."""
Origin = tuple[str, str, int]
"""Scheme, host name and port of a page: pages that differ in one of them are different sites."""
FOREIGN_FETCH_SITES = ("cross-site", "same-site")
"""Values of Sec-Fetch-Site: "same-site" is another port or another name of the same domain."""
FRAME_HEADER = (b"content-security-policy", b"frame-ancestors 'self'")
"""No other site may show the page in a frame, where users could be tricked into clicks."""
FOREIGN_URL_PATTERN = re.compile(r"/(file|proxy)[=/]\s*https?:", re.IGNORECASE)
"""A path by which gradio would fetch an address for anybody who asks."""
UNUSED_PATH_PATTERN = re.compile(r"/stream/|/custom_component/|/dev/reload|/cancel/?$|\n")
"""Paths of gradio's that no page here asks for. By the first, a request changes what an event that
is drawing was asked, and it never ends. By the third, each connection is looked after twenty times
a second. By the fourth, one that is cancelled twice keeps its form for good, and the place of the
only drawing. With a line's end a path is found as without it, and not known here."""
DROPPED_HEADERS = (b"x-gradio-server", b"range")
"""Headers that gradio does not get: by the first it writes an address into what all users get."""
UNKNOWN_HOST_MESSAGE = "unknown host; start the app with --allowed_host for this name"
"""The answer to a host name that is not the page's."""
TOLD_ALREADY = "response already started."
"""How starlette's error ends where a stream has told the error that is raised, as of a session that
is not known. Its traceback has thirty times the bytes of the request."""
FOREIGN_SITE_MESSAGE = (
    "another site may not ask here; behind a proxy, start the app with --allowed_host "
    "and the page's address"
)
"""The answer to another site's page."""


class TrustedHosts:
    """ASGI middleware that answers only its own page's requests.

    A host name that is not among `hosts` (None: every name is) gets 421, and a request from another
    site's page 403. A page of one of the `allowed` origins may ask, whatever Host the proxy passes
    on.
    """

    def __init__(
        self,
        app: Any,
        hosts: Collection[str] | None,
        allowed: Collection[Origin] = (),
    ) -> None:
        self.app = app
        self.hosts = hosts
        self.allowed = allowed
        self.names = {name for _, name, _ in allowed}

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        refusal = self.find_refusal(scope["path"], parse_headers(scope))
        if refusal is not None:
            await refusal(scope, receive, send)
            return

        async def send_unframed(message: dict) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), FRAME_HEADER]
            await send(message)

        # gradio keeps for all what it told the first who asked, with the Host of that request;
        # what it tells of one page, by the last "page" of a query, it makes for each
        if scope["path"].rstrip("/").endswith("/info"):
            scope = scope | {"query_string": scope["query_string"] + b"&page="}

        # gradio writes X-Forwarded-Host into addresses that all users get, so only known names pass
        asked = [
            (name, clean_cookies(value) if name == b"cookie" else value)
            for name, value in scope["headers"]
            if self.should_forward_header(scope["path"], name, value)
        ]
        try:
            await self.app(scope | {"headers": asked}, receive, send_unframed)
        except RuntimeError as error:
            if not str(error).endswith(TOLD_ALREADY):
                raise

    def should_forward_header(self, path: str, name: bytes, value: bytes) -> bool:
        """Whether gradio gets to see this header."""
        if name in DROPPED_HEADERS:
            return False
        # By the path's ending alone it compresses, also a stream, and keeps 250 KB for each.
        if name == b"accept-encoding" and "/gradio_api/" in path:
            return False
        if name != b"x-forwarded-host":
            return True
        origin = parse_origin(f"https://{value.decode('latin1')}")
        return origin is not None and origin[1] in self.names

    def find_refusal(self, path: str, headers: dict[str, str]) -> PlainTextResponse | None:
        """The answer to a request that is refused; None: it may pass.

        A browser lets no other site's page set Host, Origin or Sec-Fetch-Site.
        """
        # What no page asks for.
        if FOREIGN_URL_PATTERN.search(path):
            return PlainTextResponse("the page fetches no address", 404)
        if UNUSED_PATH_PATTERN.search(path):
            return PlainTextResponse("not of this page", 404)
        # The name by which the page is called.
        host = headers.get("host", "")
        known = parse_origin(f"http://{host}")
        if self.hosts is not None and (known is None or known[1] not in self.hosts):
            return PlainTextResponse(UNKNOWN_HOST_MESSAGE, 421)
        # The page that sends the request: it must be this one, or an allowed one.
        origin = headers.get("origin")
        if origin is not None:
            # Host tells no scheme: for a name that is not allowed, name and port must be the page's
            asked = parse_origin(origin)
            scheme = origin.partition("://")[0]
            names = (host, headers.get("x-forwarded-host", host))
            own = {parse_origin(f"{scheme}://{name}") for name in names}
            is_own = asked in own and asked is not None and asked[1] not in self.names
            if not (is_own or asked in self.allowed):
                return PlainTextResponse(FOREIGN_SITE_MESSAGE, 403)
        # A link to the page is followed; a picture or a form of another site gets nothing behind it
        if path != "/" and headers.get("sec-fetch-site") in FOREIGN_FETCH_SITES:
            return PlainTextResponse(FOREIGN_SITE_MESSAGE, 403)
        return None


@asynccontextmanager
async def install_trusted_hosts(
    hosts: Collection[str] | None,
    allowed: Collection[Origin],
    app: Any,
) -> AsyncIterator[None]:
    """A lifespan that puts TrustedHosts around everything else, including gradio's own middleware.

    Gradio adds its own outside of any given one, and would itself answer a foreign page's
    preflight.
    """
    # On a busy machine gradio starts the lifespan twice.
    if not isinstance(app.middleware_stack, TrustedHosts):
        app.middleware_stack = TrustedHosts(app.middleware_stack, hosts, allowed)
    yield


def parse_headers(scope: dict) -> dict[str, str]:
    """Name -> value of a request's headers."""
    return {name.decode("latin1"): value.decode("latin1") for name, value in scope["headers"]}


def clean_cookies(value: bytes) -> bytes:
    """A Cookie header without backslashes, of which no cookie of the page has one: Python before
    3.11.10 reads 60 KB of them in half a minute, and the page answers nobody meanwhile."""
    return value.replace(b"\\", b"")


def parse_origin(url: str) -> Origin | None:
    """The origin of an address, by default with its scheme's port; None for an invalid one."""
    try:
        parts = urlsplit(url)
        port = parts.port or DEFAULT_PORTS[parts.scheme]
        return (parts.scheme, parts.hostname, port) if parts.hostname else None
    except (ValueError, KeyError):
        return None


def parse_origins(text: str) -> set[Origin]:
    """The origins that a host name or address means.

    Without a scheme these are http and https, and without a port the scheme's own. Raises UserError
    for what is no host name.
    """
    urls = [text] if "//" in text else [f"{scheme}://{text}" for scheme in DEFAULT_PORTS]
    origins = {parse_origin(url) for url in urls}
    if origins == {None}:
        raise UserError(
            f"--allowed_host {text!r:.60} is not a host name; write it like pictures.example.org, "
            "or with scheme and port like https://pictures.example.org:8443"
        )
    return origins - {None}


FILE_ENDPOINTS = ("upload", "upload_progress", "component_server", "deep_link", "process_recording")
"""Last parts of the paths by which gradio takes something other than a form, or writes it down."""
MAX_SESSION_NAME = 64
MAX_FORM_BYTES = 64 * 1024
"""The longest form of a public page, and of whoever has not logged in."""
MAX_CONNECTIONS = 2**16
"""As many as one address has ports."""
STALL_SEC = 60
"""How long a connection waits for its client to take what is sent."""
MAX_UNREAD_MESSAGES = 4096
"""Messages that wait for all sessions of a public page together; one with a preview has 30 KB."""
MAX_FILES = 16
"""The most files that a form of a public page names: twice as many as one request draws."""
URL_FIELD_PATTERN = re.compile(r'"path": "https?://', re.IGNORECASE)
"""In a form: a file by its address."""
API_INFO_PATTERN = re.compile(rb"(window\.gradio_api_info = ).*?(;</script>)", re.DOTALL)
"""Where gradio writes the endpoints into the page, with the names of adapters and runs."""


class PublicPageGuard:
    """ASGI middleware of a public page, which takes no files and no long forms.

    A path for files gets 404. A body that is longer than a form gets 413, as gradio would hold it
    in memory.
    """

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        refusal = self.find_refusal(scope) if scope["type"] == "http" else None
        await (refusal or self.app)(scope, receive, send)

    def find_refusal(self, scope: dict) -> PlainTextResponse | None:
        """The answer to a request that is refused; None: it may pass."""
        if scope["path"].rstrip("/").rpartition("/")[2] in FILE_ENDPOINTS:
            return PlainTextResponse("this page takes no files", 404)
        return refuse_long_body(scope)


def refuse_long_body(scope: dict) -> PlainTextResponse | None:
    """The answer to a body that is longer than a form, or in chunks, which promise no length."""
    headers = parse_headers(scope)
    length = headers.get("content-length", "")
    is_form = length.isdigit() and int(length) <= MAX_FORM_BYTES
    if scope["method"] in ("GET", "HEAD") or (is_form and "transfer-encoding" not in headers):
        return None
    return PlainTextResponse("too long, or of an unknown length", 413)


class LoginGuard:
    """ASGI middleware of a page with a login. Who has not logged in sends no long body, which
    gradio reads before it asks who it is, and is not told the endpoints."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or is_logged_in(scope):
            await self.app(scope, receive, send)
            return
        refusal = refuse_long_body(scope)
        if refusal is not None:
            await refusal(scope, receive, send)
            return
        started: list[dict] = []

        async def send_without_names(message: dict) -> None:
            # The length of the page is known when its body is.
            if message["type"] == "http.response.start" and is_html(message):
                started.append(message)
                return
            if started:
                start = started.pop()
                message["body"] = API_INFO_PATTERN.sub(rb"\1{}\2", message["body"])
                length = str(len(message["body"])).encode()
                kept = [pair for pair in start["headers"] if pair[0] != b"content-length"]
                await send(start | {"headers": [*kept, (b"content-length", length)]})
            await send(message)

        # Nothing of it comes compressed.
        asked = [pair for pair in scope["headers"] if pair[0] != b"accept-encoding"]
        await self.app(scope | {"headers": asked}, receive, send_without_names)


def is_html(start: dict) -> bool:
    """Whether an answer that begins so is a page."""
    return any(
        name == b"content-type" and b"text/html" in value for name, value in start["headers"]
    )


def is_logged_in(scope: dict) -> bool:
    """Whether gradio knows who asks, by the cookies that it gives; True where nobody is asked."""
    app = scope["app"]
    if app.auth is None:
        return True
    cookies = Request(scope).cookies
    names = (f"access-token-{app.cookie_id}", f"access-token-unsecure-{app.cookie_id}")
    return any(app.tokens.get(cookies.get(name)) is not None for name in names)


class SessionMessages(LRUCache):
    """Session -> messages that wait for it. One may be deleted twice: gradio does so when two
    streams of a session end, and at an error the second's clock would tick for good."""

    def __delitem__(self, session: str) -> None:
        if session in self:
            super().__delitem__(session)


def protect_queue(page: gr.Blocks) -> None:
    """Let no session stop the queue of pictures, nor fill the memory by its name.

    Gradio stops its queue for good when a waiting event's session has no place for messages: one
    that was forgotten, or one without a name. The events of a forgotten one it remembers, and every
    message of one that asks for pictures and never listens.
    """
    queue = page._queue
    queue.pending_messages_per_session = SessionMessages(
        queue.pending_messages_per_session.max_size
    )
    push, send = queue.push, queue.send_message

    # An event that comes in: its session has a name, and what forgotten ones left is dropped.
    async def push_validated(body: Any, request: Any, username: str | None) -> tuple:
        named = body.session_hash is None or 0 < len(body.session_hash) <= MAX_SESSION_NAME
        if not named:
            return False, "a session's name has 1 to 64 characters", "error"
        known = queue.pending_event_ids_session
        for forgotten in known.keys() - queue.pending_messages_per_session.keys():
            del known[forgotten]
        return await push(body=body, request=request, username=username)

    # A message that goes out: to sessions that are still known alone. Whoever reads least is
    # forgotten when too many wait, with their previews.
    def send_to_listeners(event: Any, message: Any) -> None:
        places = queue.pending_messages_per_session
        if event.session_hash in places:
            send(event, message)
            unread = {name: messages.qsize() for name, messages in places.items()}
            if sum(unread.values()) > MAX_UNREAD_MESSAGES:
                del places[max(unread, key=unread.__getitem__)]

    queue.push = push_validated
    queue.send_message = send_to_listeners


class StallLimitedProtocol(H11Protocol):
    """uvicorn's connection by h11, which ends when what it sends is not taken for a minute: it
    waits for a reader without a limit, and keeps 200 KB of a file meanwhile."""

    def pause_writing(self) -> None:
        """More than 64 KiB wait to be sent."""
        super().pause_writing()
        self.stalled = self.loop.call_later(STALL_SEC, self.transport.abort)

    def resume_writing(self) -> None:
        """Most of them have been."""
        self.stalled.cancel()
        super().resume_writing()


def install_stall_limit() -> None:
    """Let uvicorn hold connections by `StallLimitedProtocol`. Its h11 ends one at 64 KiB of
    headers; httptools, which it prefers where that is installed, reads on without a limit."""
    HTTP_PROTOCOLS["auto"] = StallLimitedProtocol


def raise_connection_limit() -> None:
    """Let the process hold more connections than one small client can open: by the usual limit, a
    thousand that say nothing kept everybody else out."""
    if sys.platform == "win32":  # which has no such limit
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MAX_CONNECTIONS if hard == resource.RLIM_INFINITY else min(hard, MAX_CONNECTIONS)
    with suppress(ValueError, OSError):  # the system has a lower limit of its own
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))


def refuse_foreign_files(page: gr.Blocks) -> None:
    """Refuse a form that names an address in place of a file, or more files than a gallery holds.

    Gradio would fetch the one, however long it is, and keep it. For the others it looks in all its
    folders, and answers nobody meanwhile. It makes a session components of its own: none is asked.
    """
    preprocess = page.preprocess_data

    async def preprocess_checked(fn: Any, inputs: list, *args: Any, **options: Any) -> list:
        # Quotes inside of a text are escaped, so these are names of a field.
        form = json.dumps(inputs, default=str)
        if URL_FIELD_PATTERN.search(form):
            raise gr.Error("The page fetches no address.", print_exception=False)
        if form.count('"path":') > MAX_FILES:
            raise gr.Error("The form names too many files.", print_exception=False)
        return await preprocess(fn, inputs, *args, **options)

    page.preprocess_data = preprocess_checked
