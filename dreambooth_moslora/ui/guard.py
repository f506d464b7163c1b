"""What a request may be on every page: its host and origin, its length, and the disk space of uploads.

No page answers to another site's page, and one on the loopback only to its own names: otherwise any site could point a
name of its own at 127.0.0.1 (DNS rebinding), or use the login that the browser holds. Requests are held in memory, so
only uploads, which Gradio writes to the disk, may be long; a visitor's oldest are deleted when they are too many.
"""

import json
import re
import shutil
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import gradio as gr
from gradio.utils import get_upload_folder
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.formparsers import MultiPartException
from starlette.responses import PlainTextResponse

from dreambooth_moslora.core import UserError
from dreambooth_moslora.ui.visitors import Layer, cookie_of, header_of

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
REFUSED = "another site may not ask here; behind a proxy, start the app with --allowed_host and the page's address"
ELSEWHERE = re.compile(r"/(file|proxy)[=/]\s*https?:", re.IGNORECASE)
"""A path by which gradio would fetch an address for anybody who asks, also for another site's picture."""
SAME_SITE_NONE = re.compile(rb"samesite=none", re.IGNORECASE)


class TrustedHosts(Layer):
    """Answers 421 for a host name that is not among `hosts` (None: all are), 403 for requests from another site's page.
    A page of one of the `allowed` origins may ask, whatever Host the proxy passes on. Cookies become SameSite=Lax."""

    def __init__(self, app: Any, hosts: Collection[str] | None, allowed: Collection[Origin] = ()) -> None:
        super().__init__(app)
        self.hosts, self.allowed = hosts, allowed
        self.names = {name for _, name, _ in allowed}

    async def answer(self, scope: dict, receive: Any, send: Any) -> None:
        if refusal := self._refusal(scope):
            await refusal(scope, receive, send)
            return
        asked = []
        for name, value in scope["headers"]:
            # gradio puts X-Forwarded-Host into addresses that all users get: only known names and real ports pass
            named = _origin(f"https://{value.decode('latin1')}") if name == b"x-forwarded-host" else None
            if name != b"x-forwarded-host" or (named and named[1] in self.names):
                asked.append((name, value))
        own = {(name.lower(), value) for name, value in scope["headers"] if name.lower() not in OF_ANSWERS}

        async def send_cleaned(message: dict) -> None:
            """Without the request's own headers: for a part of a file gradio repeats them, also the HttpOnly cookie."""
            if message["type"] == "http.response.start":
                headers = []
                for name, value in message.get("headers", ()):
                    lax = SAME_SITE_NONE.sub(b"SameSite=Lax", value) if name.lower() == b"set-cookie" else value
                    headers += [(name, lax)] if (name.lower(), lax) not in own else []
                message["headers"] = [*headers, FRAMES]
            await send(message)

        await self.app(scope | {"headers": asked}, receive, send_cleaned)

    def _refusal(self, scope: dict) -> PlainTextResponse | None:
        """Host and X-Forwarded-Host give the page's own name and port: a browser does not let another site's page
        set them. They do not tell the scheme; for an allowed name it is one of those that are allowed."""
        if ELSEWHERE.search(scope["path"]):
            return PlainTextResponse("the page fetches no address", 404)
        headers = {name: value.decode("latin1") for name, value in scope["headers"] if name in HEADERS}
        host, origin = headers.get(b"host", ""), headers.get(b"origin")
        name = None
        with suppress(ValueError):
            name = urlsplit(f"//{host}").hostname
        if self.hosts is not None and name not in self.hosts:
            return PlainTextResponse("unknown host; start the app with --allowed_host for this name", 421)
        if origin is not None:
            asked, scheme = _origin(origin), origin.partition("://")[0]
            is_own = asked in {_origin(f"{scheme}://{one}") for one in (host, headers.get(b"x-forwarded-host", host))}
            if is_own and asked and asked[1] in self.names:
                is_own = asked[:2] in {known[:2] for known in self.allowed}
            if asked is None or not (is_own or asked in self.allowed):
                return PlainTextResponse(REFUSED, 403)
        if scope["path"].rstrip("/") == "/logout" and headers.get(b"sec-fetch-site") in FOREIGN_SITES:
            return PlainTextResponse("another site may not end a login", 403)
        return None


@asynccontextmanager
async def trusted_hosts(hosts: Collection[str] | None, allowed: Collection[Origin], app: Any) -> AsyncIterator[None]:
    """A lifespan that puts TrustedHosts around everything else, including gradio's own middleware. Gradio adds its own
    outside of any given one, and would itself answer a foreign page's preflight. On a busy machine it starts twice."""
    if not isinstance(app.middleware_stack, TrustedHosts):
        app.middleware_stack = TrustedHosts(app.middleware_stack, hosts, allowed)
    yield


def _origin(url: str) -> Origin | None:
    """The port is by default the scheme's; None for an invalid address."""
    try:
        parts = urlsplit(url)
        port = parts.port or DEFAULT_PORTS[parts.scheme]
        return (parts.scheme, parts.hostname, port) if parts.hostname else None
    except (ValueError, KeyError):
        return None


def origins_of(text: str) -> set[Origin]:
    """What a host name or address means; without a scheme http and https, without a port its own. Raises UserError."""
    origins = {_origin(url) for url in ([text] if "//" in text else [f"{scheme}://{text}" for scheme in DEFAULT_PORTS])}
    if origins == {None}:
        raise UserError(
            f"--allowed_host {text!r:.60} is not a host name; write it like pictures.example.org, or with scheme and "
            "port like https://pictures.example.org:8443"
        )
    return origins - {None}


NO_FILES = ("upload", "upload_progress", "component_server", "deep_link")
"""Last parts of the paths by which gradio takes something other than a form, or writes it down."""
MAX_FORM_BYTES = 256 * 1024


class DrawsOnly(Layer):
    """Around a public page: 404 for files, 413 for a body longer than a form. Gradio holds a body in memory."""

    async def answer(self, scope: dict, receive: Any, send: Any) -> None:
        refusal, length = None, header_of(scope, b"content-length")
        if scope["path"].rstrip("/").rpartition("/")[2] in NO_FILES:
            refusal = PlainTextResponse("this page takes no files", 404)
        elif scope["method"] == "POST" and not (length.isdigit() and int(length) <= MAX_FORM_BYTES):
            refusal = PlainTextResponse("too long, or of an unknown length", 413)
        await (refusal or self.app)(scope, receive, send)


def fetch_nothing(page: gr.Blocks) -> None:
    """A form may name an address in place of a file: gradio would fetch it, and keep it for a day."""
    for block in page.blocks.values():
        keep = block.async_move_resource_to_block_cache
        block.async_move_resource_to_block_cache = partial(_of_this_machine, keep)


async def _of_this_machine(keep: Callable, path: str | None) -> str | None:
    if path and path.lower().startswith(("http://", "https://")):
        raise gr.Error("The page fetches no address.", print_exception=False)
    return await keep(path)


UPLOAD, FILES = "/gradio_api/upload", b"files"
"""Path of an upload, and the name of the form's field that holds its files: gradio has no answer to a text there."""
MAX_BODY_BYTES = 4 * 1024**2
"""Far more than any form of the page needs; parsing takes several times as much memory."""
MAX_UPLOAD_BYTES = 512 * 1024**2  # Limit of all files of one upload together


class BodySizeLimit(Layer):
    """Answers 413 for too long a declared length, and cuts off a longer body. Files may be longer."""

    async def answer(self, scope: dict, receive: Any, send: Any) -> None:
        is_upload = scope["path"] == UPLOAD
        if promised_bytes(scope) > MAX_BODY_BYTES + MAX_UPLOAD_BYTES * is_upload:
            await PlainTextResponse("too long; files are sent to /upload", 413)(scope, receive, send)
            return
        try:
            bounded = _watched(receive, scope) if is_upload else _counted(receive)
        except FormParserError:
            await PlainTextResponse("the parts of the upload have too long a boundary", 400)(scope, receive, send)
            return
        await self.app(scope, bounded, send)


def promised_bytes(scope: dict) -> int:
    promised = header_of(scope, b"content-length")
    return int(promised) if promised.isdigit() else 0


def _counted(receive: Any) -> Any:
    """`receive` up to MAX_BODY_BYTES; after that the client counts as disconnected."""
    taken = 0

    async def counted() -> dict:
        nonlocal taken
        message = await receive()
        taken += len(message.get("body", b""))
        return message if taken <= MAX_BODY_BYTES else {"type": "http.disconnect"}

    return counted


def _watched(receive: Any, scope: dict) -> Any:
    """`receive` that raises MultiPartException, at which gradio deletes what it wrote, when too long or ended early."""
    taken, meter, is_open = 0, _FieldMeter(header_of(scope, b"content-type")), True

    async def watched() -> dict:
        nonlocal taken, is_open
        message = await receive()
        if is_open and message["type"] == "http.disconnect":
            raise MultiPartException("The sender has left.")
        body, is_open = message.get("body", b""), message.get("more_body", False)
        taken += len(body)
        meter.write(body)
        if taken > MAX_BODY_BYTES + MAX_UPLOAD_BYTES or meter.field_bytes > MAX_BODY_BYTES:
            raise MultiPartException("The upload exceeded its maximum allowed size.")
        return message

    return watched


class _FieldMeter:
    """Counts the bytes of no file, which gradio keeps in memory. The methods `on_…` are the parser's callbacks."""

    def __init__(self, content_type: bytes) -> None:
        self.field_bytes = 0
        self._name, self._value, self._is_file = bytearray(), bytearray(), False
        boundary = parse_options_header(content_type)[1].get(b"boundary")
        names = ("on_part_begin", "on_header_field", "on_header_value", "on_header_end", "on_part_data")
        callbacks = {name: getattr(self, name) for name in names}
        self._parser = MultipartParser(boundary, callbacks) if boundary else None

    def write(self, data: bytes) -> None:
        """Ignores unreadable data: gradio refuses it with a message."""
        try:
            if self._parser:
                self._parser.write(data)
        except FormParserError:
            self._parser = None

    def on_part_begin(self) -> None:
        self._is_file = False

    def on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._name.extend(data[start:end])

    def on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value.extend(data[start:end])

    def on_header_end(self) -> None:
        if self._name.lower() == b"content-disposition":
            options = parse_options_header(bytes(self._value))[1]
            self._is_file = b"filename" in options
            if options.get(b"name") == FILES and not self._is_file:
                raise MultiPartException(f"A part of {FILES.decode()} is no file.")
        self._name.clear()
        self._value.clear()

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        if not self._is_file:
            self.field_bytes += end - start


MAX_BYTES_EACH = 2 * 1024**3  # Four of the longest uploads, or 50 of the largest photos
DISK_RESERVE_BYTES = 1024**3  # Space that uploads must leave free, since a visitor can invent further cookies
MAX_ANSWER_BYTES = 1024**2


class UploadQuota(Layer):
    """Records what each visitor has uploaded; answers 507 when the upload would fill the disk."""

    def __init__(self, app: Any) -> None:
        super().__init__(app)
        self._stored: dict[str, OrderedDict[Path, int]] = {}

    async def answer(self, scope: dict, receive: Any, send: Any) -> None:
        if scope["path"].rstrip("/") != UPLOAD:
            await self.app(scope, receive, send)
            return
        folder = Path(get_upload_folder())
        place = next(place for place in (folder, *folder.parents) if place.exists())
        if shutil.disk_usage(place).free - promised_bytes(scope) < DISK_RESERVE_BYTES:
            await PlainTextResponse("the server's disk is almost full; no upload is taken", 507)(scope, receive, send)
            return
        answer, is_good = bytearray(), False

        async def noted(message: dict) -> None:
            nonlocal is_good
            is_good = message["status"] == 200 if message["type"] == "http.response.start" else is_good
            if is_good and len(answer) < MAX_ANSWER_BYTES:
                answer.extend(message.get("body", b""))
            await send(message)

        await self.app(scope, receive, noted)
        self._note(scope, answer)

    def _note(self, scope: dict, answer: bytearray) -> None:
        """The owner by the cookie, else by the address: an upload names no session. The answer lists the paths."""
        cookie = cookie_of(scope)
        owner = f"cookie:{cookie}" if cookie else f"address:{(scope.get('client') or ('',))[0]}"
        try:
            paths = [Path(path) for path in json.loads(answer)] if answer else []
        except (ValueError, TypeError):
            paths = []
        mine = self._stored.setdefault(owner, OrderedDict())
        for path in paths:
            with suppress(OSError):
                mine[path] = path.stat().st_size
                mine.move_to_end(path)
        while sum(mine.values()) > MAX_BYTES_EACH and len(mine) > max(1, len(paths)):
            oldest, _ = mine.popitem(last=False)
            if not any(oldest in theirs for theirs in self._stored.values()):
                oldest.unlink(missing_ok=True)
