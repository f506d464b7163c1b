"""HTTP side of the service, an ASGI app. It checks a request, finds its adapters, and has it drawn.

POST /generate   {"prompt", "adapter", "seed", …} -> PNG with its recipe
GET  /adapters   names
GET  /healthz    the base, and whether a replica answers

Who holds a token may ask. Without tokens, only programs of this machine may ask, over the loopback.
Web pages never may.
"""

import asyncio
import hashlib
import hmac
import logging
import os
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from dreambooth_moslora.errors import UserError, format_error
from dreambooth_moslora.extras.serving.catalogue import (
    Catalogue,
    ImageOrder,
    RefusedError,
    build_timeout_error,
    parse_order,
)

TOKEN_VARIABLE = "DREAMBOOTH_TOKEN"
"""The environment's name of the token, as a flag would show it in process lists."""
LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
"""Names of this machine that no other machine reaches."""
PUBLIC_PATHS = frozenset({"/healthz"})
"""Paths without a token, for load balancers."""
MIN_TOKEN_CHARACTERS = 16
"""Fewer could be guessed."""


class Access:
    """Each of the `tokens` opens all paths. Without tokens, only requests to a loopback host name
    are answered: a web page cannot reach the service under its own name then (DNS rebinding)."""

    def __init__(self, tokens: Sequence[str]) -> None:
        self._digests = [digest_token(token) for token in tokens]

    def check(self, path: str, headers: Mapping[str, str]) -> None:
        """Raise RefusedError for a web page, an unknown host name, and a wrong token."""
        try:
            host = urlsplit(f"//{headers.get('host', '')}").hostname
        except ValueError:
            host = None
        if "origin" in headers:
            raise RefusedError(403, "web pages may not send requests; use a program")
        if not self._digests and host not in LOOPBACK:
            raise RefusedError(421, "unknown host; without a token only this machine is answered")

        # the token is compared with all, so that the time tells nothing
        kind, _, token = headers.get("authorization", "").partition(" ")
        digest = digest_token(token.strip())
        fits = [hmac.compare_digest(digest, valid_digest) for valid_digest in self._digests]
        is_known = any(fits) and kind.lower() == "bearer"
        if self._digests and path not in PUBLIC_PATHS and not is_known:
            raise RefusedError(
                401, "a token is needed: send the header `Authorization: Bearer TOKEN`"
            )


def digest_token(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()


RAY_TIMEOUTS = {
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "60",
}
"""Environment of Ray Serve: its default of 5 seconds restarts the proxy again and again on a busy
machine."""
MAX_SETTINGS = {
    "port": 65535,
    "replicas": 1024,
    "max_waiting": 100_000,
    "batch": 1024,
    "resident_adapters": 1024,
    "threads": 1024,
    "per_gpu": 64,
    "request_timeout": 86400,
}
"""The numbers among the settings, which begin at 1, and the highest value of each."""


@dataclass(frozen=True)
class ServeSettings:
    """Settings of a service.

    adapters: folders
    pretrained_model_name_or_path: the base
    host, port: where it listens
    replicas: processes that hold the base and draw
    tokens: each opens the service; without any only this machine is answered
    max_waiting: requests that may wait or be drawn at once
    request_timeout: seconds until a request gets 504
    batch: most orders of equal adapters and size that are drawn in a row
    resident_adapters: adapters that a replica keeps in the model
    threads: of each replica on a CPU
    per_gpu: replicas on a GPU; None without GPUs

    Raises UserError for a value out of range, and for a public address without a token.
    """

    adapters: tuple[str, ...]
    pretrained_model_name_or_path: str = "toy"
    host: str = "127.0.0.1"
    port: int = 8000
    replicas: int = 1
    tokens: tuple[str, ...] = ()
    max_waiting: int = 64
    request_timeout: int = 120
    batch: int = 8
    resident_adapters: int = 8
    threads: int = 1
    per_gpu: int | None = None

    def __post_init__(self) -> None:
        if not self.adapters:
            raise UserError("missing: --adapters, a folder of adapters.")
        for name, high in MAX_SETTINGS.items():
            value = getattr(self, name)
            if value is not None and (type(value) is not int or not 1 <= value <= high):
                raise UserError(f"--{name} {value}: must be a whole number from 1 to {high}.")
        for token in self.tokens:
            # none that can be guessed, or cannot stand in a header
            is_long = len(token) >= MIN_TOKEN_CHARACTERS
            if not is_long or not token.isascii() or not token.isprintable() or " " in token:
                raise UserError(
                    f"a token needs at least {MIN_TOKEN_CHARACTERS} letters and digits, "
                    "without spaces."
                )
        if self.host not in LOOPBACK and not self.tokens:
            how = f"give --token, or set {TOKEN_VARIABLE}."
            raise UserError(f"--host {self.host} can be reached from other machines: {how}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ServeSettings":
        """Read the settings of a Serve config file, whose proxies listen everywhere. Raises
        UserError for an unknown name."""
        if unknown := sorted(set(values) - {field.name for field in fields(cls)}):
            raise UserError(f"unknown setting {unknown[0]!r}.")
        places = values.get("adapters", ())
        adapters = (places,) if isinstance(places, str) else tuple(places)
        tokens = collect_tokens(values.get("tokens", ()))
        return cls(**{"host": "0.0.0.0", **values, "adapters": adapters, "tokens": tokens})


def collect_tokens(tokens: Any) -> tuple[str, ...]:
    """Collect the tokens of the flags, and the one of the environment, if there is one."""
    environment_token = os.environ.get(TOKEN_VARIABLE)
    return (*(tokens or ()), *([environment_token] if environment_token else ()))


HEALTH_SEC = 10.0
"""How long a replica may take to report its health."""
BODY_SEC = 10.0
"""How long a body may take to arrive."""
RETRY_SEC = 5
"""When a client is told to ask again."""
MAX_BODY_BYTES = 64 * 1024
"""A body fits two prompts of the longest kind with every letter escaped."""
logger = logging.getLogger(__name__)


@dataclass
class Front:
    """Answers the requests.

    draw: has an order drawn by a replica, as a PNG
    facts: asks a replica about the base
    catalogue: the adapters that a request may name
    access: who may ask
    max_inside: requests that wait or are drawn at once
    request_timeout_sec: until a request is given up
    """

    draw: Callable[[ImageOrder], Awaitable[bytes]]
    facts: Callable[[], Awaitable[dict]]
    catalogue: Catalogue
    access: Access
    max_inside: int
    request_timeout_sec: float

    def __post_init__(self) -> None:
        self.active_requests = 0

    def _refuse_if_full(self) -> None:
        """Raise RefusedError (503)."""
        if self.active_requests >= self.max_inside:
            raise RefusedError(503, "the queue is full; ask again later", RETRY_SEC)

    async def generate(self, request: Request) -> Response:
        """Return a PNG. Raises UserError."""
        # read the body before a place is taken: slow senders would hold all places
        self._refuse_if_full()
        started = time.monotonic()
        body = await self._read_body(request)
        self._refuse_if_full()

        # draw within the time limit, which began with the request
        self.active_requests += 1
        try:
            async with asyncio.timeout(self.request_timeout_sec):
                order = await self._build_order(body, started)
                png = await self.draw(order)
        except TimeoutError as error:
            raise build_timeout_error() from error
        finally:
            self.active_requests -= 1

        return Response(png, media_type="image/png", headers={"Cache-Control": "no-store"})

    async def _read_body(self, request: Request) -> bytes:
        """Raise RefusedError for what is no JSON, too long, or too slow."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise RefusedError(415, "send JSON, with the header `Content-Type: application/json`")
        try:
            async with asyncio.timeout(min(BODY_SEC, self.request_timeout_sec)):
                return await read_body(request)
        except TimeoutError as error:
            raise RefusedError(408, "the body did not arrive in time; send it at once") from error

    async def _build_order(self, body: bytes, started: float) -> ImageOrder:
        """Build the order of a body, with the adapters' files and the seconds left. Raises
        UserError."""
        order = parse_order(body)
        refs = []
        for name, _ in order.params.adapters:
            # in a thread, as it may read a file
            refs.append(await asyncio.to_thread(self.catalogue.find, name))
        left_sec = self.request_timeout_sec - (time.monotonic() - started)
        return replace(order, adapters=tuple(refs), seconds=left_sec)

    async def list_adapters(self, request: Request) -> Response:
        return JSONResponse({"adapters": await asyncio.to_thread(self.catalogue.list_names)})

    async def check_health(self, request: Request) -> Response:
        """Return the base's facts from a replica. Raises RefusedError (503) when none answers."""
        try:
            async with asyncio.timeout(HEALTH_SEC):
                facts = await self.facts()
        except TimeoutError as error:
            raise RefusedError(503, "no replica answers", RETRY_SEC) from error
        return JSONResponse({"status": "ok", **facts})


async def read_body(request: Request) -> bytes:
    """Raise RefusedError (413) as soon as the body or its declared length is too long."""
    promised = request.headers.get("content-length", "")
    body = b""
    # an absurdly long number is not parsed; the count below refuses such a body
    if not (promised.isdecimal() and len(promised) < 20 and int(promised) > MAX_BODY_BYTES):
        async for part in request.stream():
            body += part
            if len(body) > MAX_BODY_BYTES:
                break
        else:
            return body
    raise RefusedError(413, f"the body is too long; at most {MAX_BODY_BYTES // 1024} KiB are read")


def build_front(front: Front) -> Starlette:
    """Build the ASGI app, in which every path is guarded by `front.access`."""

    def wrap_endpoint(endpoint: Callable[[Request], Awaitable[Response]]) -> Callable:
        async def check_and_call(request: Request) -> Response:
            # not `request.url`: older starlettes build it from the Host header
            front.access.check(request.scope["path"], request.headers)
            return await endpoint(request)

        return check_and_call

    routes = [
        Route("/generate", wrap_endpoint(front.generate), methods=["POST"]),
        Route("/adapters", wrap_endpoint(front.list_adapters)),
        Route("/healthz", wrap_endpoint(front.check_health)),
    ]
    handlers = dict.fromkeys((UserError, HTTPException, Exception), render_error)
    app = Starlette(routes=routes, exception_handlers=handlers)
    app.router.redirect_slashes = False  # a redirect would skip the checks of token and Host
    return app


async def render_error(request: Request, error: Exception) -> Response:
    """Render an error as one line of JSON."""
    if isinstance(error, HTTPException):
        line = f"{request.method} is not answered here; POST /generate draws"
        return JSONResponse({"error": line}, error.status_code)
    if not isinstance(error, UserError):
        logger.error("A request failed", exc_info=error)
        return JSONResponse({"error": "something went wrong; the server's log says what"}, 500)

    # a refusal has a status, and may say when to ask again
    status = getattr(error, "status", 400)
    retry_sec = getattr(error, "retry_sec", None)
    headers = {}
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if retry_sec is not None:
        headers["Retry-After"] = str(retry_sec)
    return JSONResponse({"error": format_error(error, 500)}, status, headers)
