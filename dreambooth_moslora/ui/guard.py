"""Limits on requests: host, origin, and on a public page the length.

No page answers to another site's page, and a page on the loopback answers to its own names only:
otherwise any site could point its name at 127.0.0.1 (DNS rebinding), or use the browser's login.
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
"""Scheme -> the port of an address without one."""
Origin = tuple[str, str, int]
"""Scheme, host name and port of a page: pages that differ in any of them are different sites."""
FOREIGN_FETCH_SITES = ("cross-site", "same-site")
"""Values of Sec-Fetch-Site: "same-site" is another port or another name of the same domain."""
FRAME_HEADER = (b"content-security-policy", b"frame-ancestors 'self'")
"""Header that forbids other sites to frame the page, where users could be tricked into clicks."""
FOREIGN_URL_PATTERN = re.compile(r"/(file|proxy)[=/]\s*https?:", re.IGNORECASE)
"""Path by which gradio would fetch any address for any client."""
UNUSED_PATH_PATTERN = re.compile(r"/stream/|/custom_component/|/dev/reload|/cancel/?$|\n")
"""Paths of gradio that this page never requests.

- /stream/ changes the inputs of an event that is running, and the event never ends.
- /dev/reload polls for each connection twenty times a second.
- /cancel: an event that is cancelled twice holds its form, and the only place on the GPU, for good.
- Gradio ignores a line break in a path, which would hide the path from these patterns.
"""
DROPPED_HEADERS = (b"x-gradio-server", b"range")
"""Headers that gradio does not get. It writes an address from the first into answers to all users;
an odd range is an error of the server."""
UNKNOWN_HOST_MESSAGE = "unknown host; start the app with --allowed_host for this name"
"""Answer to a host name that is not the page's."""
RESPONSE_STARTED = "response already started."
"""End of starlette's error for a stream that has already sent its error, as for an unknown session.
It is not logged: its traceback has thirty times the bytes of the request."""
FOREIGN_SITE_MESSAGE = (
    "another site may not ask here; behind a proxy, start the app with --allowed_host "
    "and the page's address"
)
"""Answer to another site's page."""


class TrustedHosts:
    """ASGI middleware that answers only its own page's requests.

    A host name that is not among `hosts` (None: every name is) gets 421, and a request from another
    site's page 403. Requests from pages of the `allowed` origins pass, whatever Host the proxy
    sends.
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

        # Gradio caches its first answer for all users, with the Host of that request. It caches no
        # answer about a single page, which the last "page" of a query names.
        if scope["path"].rstrip("/").endswith("/info"):
            scope = scope | {"query_string": scope["query_string"] + b"&page="}

        # Drop headers that gradio should not get.
        headers = [
            (name, clean_cookies(value) if name == b"cookie" else value)
            for name, value in scope["headers"]
            if self.should_forward_header(scope["path"], name, value)
        ]
        try:
            await self.app(scope | {"headers": headers}, receive, send_unframed)
        except RuntimeError as error:
            if not str(error).endswith(RESPONSE_STARTED):
                raise

    def should_forward_header(self, path: str, name: bytes, value: bytes) -> bool:
        """Return whether gradio gets this header."""
        if name in DROPPED_HEADERS:
            return False
        # Gradio would compress streams, too, and hold 250 KB for each.
        if name == b"accept-encoding" and "/gradio_api/" in path:
            return False
        if name != b"x-forwarded-host":
            return True
        # Gradio writes this name into addresses for all users, so it must be an allowed one.
        origin = parse_origin(f"https://{value.decode('latin1')}")
        return origin is not None and origin[1] in self.names

    def find_refusal(self, path: str, headers: dict[str, str]) -> PlainTextResponse | None:
        """Return the answer to a request that is refused, or None if it may pass.

        No browser lets another site's page set Host, Origin or Sec-Fetch-Site.
        """
        # Paths that the page never requests.
        if FOREIGN_URL_PATTERN.search(path):
            return PlainTextResponse("the page fetches no address", 404)
        if UNUSED_PATH_PATTERN.search(path):
            return PlainTextResponse("not of this page", 404)
        # The name of the page in the request.
        host = headers.get("host", "")
        host_origin = parse_origin(f"http://{host}")
        if self.hosts is not None and (host_origin is None or host_origin[1] not in self.hosts):
            return PlainTextResponse(UNKNOWN_HOST_MESSAGE, 421)
        # The page that sends the request: it must be this one, or an allowed one.
        origin = headers.get("origin")
        if origin is not None:
            # Host has no scheme: for a name that is not allowed, name and port must be the page's.
            page_origin = parse_origin(origin)
            scheme = origin.partition("://")[0]
            names = (host, headers.get("x-forwarded-host", host))
            own_origins = {parse_origin(f"{scheme}://{name}") for name in names}
            is_own = (
                page_origin in own_origins
                and page_origin is not None
                and page_origin[1] not in self.names
            )
            if not (is_own or page_origin in self.allowed):
                return PlainTextResponse(FOREIGN_SITE_MESSAGE, 403)
        # Another site may link to the page, but its images and forms reach no other path.
        if path != "/" and headers.get("sec-fetch-site") in FOREIGN_FETCH_SITES:
            return PlainTextResponse(FOREIGN_SITE_MESSAGE, 403)
        return None


@asynccontextmanager
async def install_trusted_hosts(
    hosts: Collection[str] | None,
    allowed: Collection[Origin],
    app: Any,
) -> AsyncIterator[None]:
    """Put TrustedHosts around everything else, gradio's own middleware included: a lifespan.

    Gradio adds its own middleware outside of `app_kwargs`', and would itself answer a foreign
    page's preflight.
    """
    # On a busy machine gradio starts the lifespan twice.
    if not isinstance(app.middleware_stack, TrustedHosts):
        app.middleware_stack = TrustedHosts(app.middleware_stack, hosts, allowed)
    yield


def parse_headers(scope: dict) -> dict[str, str]:
    """Map the names of a request's headers to their values."""
    return {name.decode("latin1"): value.decode("latin1") for name, value in scope["headers"]}


def clean_cookies(value: bytes) -> bytes:
    """Remove backslashes from a Cookie header; no cookie of the page has one.

    Python before 3.11.10 reads 60 KB of them in half a minute, and the page answers nobody
    meanwhile.
    """
    return value.replace(b"\\", b"")


def parse_origin(url: str) -> Origin | None:
    """Return the origin of an address, by default with its scheme's port; None if it is invalid."""
    try:
        parts = urlsplit(url)
        port = parts.port or DEFAULT_PORTS[parts.scheme]
        return (parts.scheme, parts.hostname, port) if parts.hostname else None
    except (ValueError, KeyError):
        return None


def parse_origins(text: str) -> set[Origin]:
    """Return the origins that a host name or address means.

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
"""Last parts of the paths by which gradio takes something other than a form, or stores it."""
MAX_SESSION_NAME = 64
"""Characters of a session's name at most."""
MAX_FORM_BYTES = 64 * 1024
"""Size of a form at most, on a public page and before the login."""
MAX_CONNECTIONS = 2**16
"""Open connections at most: the number of ports of one address."""
STALL_SEC = 60
"""Seconds that a connection waits for its client to read."""
MAX_UNREAD_MESSAGES = 4096
"""Messages that wait for all sessions of a public page together; one with a preview has 30 KB."""
MAX_FILES = 16
"""Files that a form of a public page may name: twice as many as one request generates."""
URL_FIELD_PATTERN = re.compile(r'"path": "https?://', re.IGNORECASE)
"""File by its address, in a form."""
API_INFO_PATTERN = re.compile(rb"(window\.gradio_api_info = ).*?(;</script>)", re.DOTALL)
"""Script in which gradio lists the endpoints, with the names of adapters and runs."""


class PublicPageGuard:
    """ASGI middleware of a public page, which takes no files and no long forms.

    A path for files gets 404. A body that is longer than a form gets 413, as gradio would hold it
    in memory.
    """

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        refusal = None
        if scope["type"] == "http":
            refusal = refuse_long_body(scope)
            if scope["path"].rstrip("/").rpartition("/")[2] in FILE_ENDPOINTS:
                refusal = PlainTextResponse("this page takes no files", 404)
        await (refusal or self.app)(scope, receive, send)


def refuse_long_body(scope: dict) -> PlainTextResponse | None:
    """Refuse a body that is longer than a form, or in chunks, which promise no length."""
    headers = parse_headers(scope)
    length = headers.get("content-length", "")
    is_form = length.isdigit() and int(length) <= MAX_FORM_BYTES
    if scope["method"] in ("GET", "HEAD") or (is_form and "transfer-encoding" not in headers):
        return None
    return PlainTextResponse("too long, or of an unknown length", 413)


class LoginGuard:
    """ASGI middleware of a page with a login.

    Until a visitor has logged in, long bodies are refused, which gradio would read before it asks
    for the login, and the names of the endpoints are hidden.
    """

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
            # Wait for the body of a page, whose length changes.
            content_type = dict(message.get("headers", ())).get(b"content-type", b"")
            if message["type"] == "http.response.start" and b"text/html" in content_type:
                started.append(message)
                return
            if started:
                start = started.pop()
                message["body"] = API_INFO_PATTERN.sub(rb"\1{}\2", message["body"])
                length = str(len(message["body"])).encode()
                headers = [pair for pair in start["headers"] if pair[0] != b"content-length"]
                await send(start | {"headers": [*headers, (b"content-length", length)]})
            await send(message)

        # A compressed page could not be searched.
        headers = [pair for pair in scope["headers"] if pair[0] != b"accept-encoding"]
        await self.app(scope | {"headers": headers}, receive, send_without_names)


def is_logged_in(scope: dict) -> bool:
    """Return whether gradio knows the visitor's cookies; True for a page without a login."""
    app = scope["app"]
    if app.auth is None:
        return True
    cookies = Request(scope).cookies
    names = (f"access-token-{app.cookie_id}", f"access-token-unsecure-{app.cookie_id}")
    return any(app.tokens.get(cookies.get(name)) is not None for name in names)


class SessionMessages(LRUCache):
    """Session -> messages that wait for it; deleting an unknown session is no error.

    Gradio deletes a session twice when two of its streams end, and after an error the second's
    timer would run for good.
    """

    def __delitem__(self, session: str) -> None:
        if session in self:
            super().__delitem__(session)


def protect_queue(page: gr.Blocks) -> None:
    """Let no session stop the queue of a public page, nor fill the memory."""
    queue = page._queue
    queue.pending_messages_per_session = SessionMessages(
        queue.pending_messages_per_session.max_size
    )
    validate_sessions(queue)
    limit_unread_messages(queue)


def validate_sessions(queue: Any) -> None:
    """Replace gradio's `queue.push` by one that refuses odd session names and drops dead sessions.

    Gradio stops its queue for good at an event of a session without a name, and never deletes the
    events of a session that it has dropped.
    """
    push = queue.push

    async def push_validated(body: Any, request: Any, username: str | None) -> tuple:
        session = body.session_hash
        if session is not None and not 0 < len(session) <= MAX_SESSION_NAME:
            return False, "a session's name has 1 to 64 characters", "error"
        event_ids = queue.pending_event_ids_session
        for dead_session in event_ids.keys() - queue.pending_messages_per_session.keys():
            del event_ids[dead_session]
        return await push(body=body, request=request, username=username)

    queue.push = push_validated


def limit_unread_messages(queue: Any) -> None:
    """Replace gradio's `queue.send_message` by one that skips dropped sessions and limits the rest.

    Gradio stops its queue for good at a message to a session that it has dropped, and stores every
    message of a client that starts events and never reads. The session with most unread messages is
    dropped when there are more than `MAX_UNREAD_MESSAGES`.
    """
    send_message = queue.send_message

    def send_to_listeners(event: Any, message: Any) -> None:
        messages = queue.pending_messages_per_session
        if event.session_hash in messages:
            send_message(event, message)
            unread_counts = {name: waiting.qsize() for name, waiting in messages.items()}
            if sum(unread_counts.values()) > MAX_UNREAD_MESSAGES:
                del messages[max(unread_counts, key=unread_counts.__getitem__)]

    queue.send_message = send_to_listeners


class StallLimitedProtocol(H11Protocol):
    """uvicorn's h11 connection that ends when its client takes nothing for a minute.

    uvicorn would wait without a limit, and hold 200 KB of a file meanwhile.
    """

    def pause_writing(self) -> None:
        """Start the clock: more than 64 KiB wait to be sent."""
        super().pause_writing()
        self.stalled = self.loop.call_later(STALL_SEC, self.transport.abort)

    def resume_writing(self) -> None:
        """Stop the clock: most of the bytes have been sent."""
        self.stalled.cancel()
        super().resume_writing()


def install_stall_limit() -> None:
    """Register `StallLimitedProtocol` as uvicorn's protocol.

    Its h11 ends a connection at 64 KiB of headers; httptools, which uvicorn prefers where it is
    installed, reads on without a limit.
    """
    HTTP_PROTOCOLS["auto"] = StallLimitedProtocol


def raise_connection_limit() -> None:
    """Raise the process's limit of open connections above what one small client can open.

    By the usual limit, a thousand connections that send nothing keep everybody else out.
    """
    if sys.platform == "win32":  # which has no such limit
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    max_connections = (
        MAX_CONNECTIONS if hard == resource.RLIM_INFINITY else min(hard, MAX_CONNECTIONS)
    )
    with suppress(ValueError, OSError):  # the system has a lower limit of its own
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, max_connections), hard))


def refuse_foreign_files(page: gr.Blocks) -> None:
    """Refuse a form that names an address instead of a file, or more files than a gallery holds.

    Gradio would fetch the address, however long the answer is, and store it. It looks for the files
    in all its folders, and answers nobody meanwhile. Gradio's `preprocess_data` is replaced, as a
    session may bring its own components, which check nothing.
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
