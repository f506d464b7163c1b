"""The HTTP side of the service, an ASGI app. It checks a request, finds its adapters, and has it drawn.

POST /generate   {"prompt", "adapter", "seed", …} -> PNG with its recipe
GET  /adapters   names
GET  /healthz    the base, and whether a replica answers
GET  /metrics    for Prometheus
"""

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from dreambooth_moslora.core.errors import UserError, one_line
from dreambooth_moslora.extras.serving.access import CONTENT_TYPE, Access, Telemetry
from dreambooth_moslora.extras.serving.catalogue import Catalogue
from dreambooth_moslora.extras.serving.orders import MAX_BODY_BYTES, Drawn, Order, RefusedError, parse_order

HEALTH_SEC, BODY_SEC = 10.0, 10.0
"""Seconds for a replica to report its health, and for a body to arrive: a slow one would hold a place in the queue."""
MOST_RETRY_SEC = 60
logger = logging.getLogger(__name__)


@dataclass
class Front:
    """`draw` sends an order to a replica; `facts` asks a replica about the base. At most `max_inside` requests
    wait or are drawn at once; each has `request_timeout_sec`."""

    draw: Callable[[Order], Awaitable[Drawn]]
    facts: Callable[[], Awaitable[dict]]
    catalogue: Catalogue
    access: Access
    max_inside: int
    request_timeout_sec: float

    def __post_init__(self) -> None:
        self.telemetry, self.inside, self.seconds = Telemetry(), 0, 1.0

    async def generate(self, request: Request) -> Response:
        status = 500
        try:
            response = await self._generate(request)
            status = response.status_code
            return response
        except ClientDisconnect:
            status = 499
            raise
        except asyncio.CancelledError:
            status = 499  # nginx's status for a client that has left
            raise
        except UserError as error:
            status = error.status if isinstance(error, RefusedError) else 400
            raise
        finally:
            self.telemetry.requests.labels(status).inc()

    async def _generate(self, request: Request) -> Response:
        if self.inside >= self.max_inside:
            raise RefusedError(503, "the queue is full; ask again later", self._retry_sec())
        self.inside += 1
        self.telemetry.inside.set(self.inside)
        try:
            async with asyncio.timeout(self.request_timeout_sec):
                started = time.monotonic()
                order = await self._order_of(request, started)
                drawn = await self.draw(order)
        except TimeoutError as error:
            raise RefusedError(504, "the picture was not drawn within the time limit; ask again later") from error
        finally:
            self.inside -= 1
            self.telemetry.inside.set(self.inside)
        seconds = time.monotonic() - started
        self.seconds += (seconds - self.seconds) / 16
        self.telemetry.note_picture(drawn, seconds)
        return Response(drawn.png, media_type="image/png", headers={"Cache-Control": "no-store"})

    async def _order_of(self, request: Request, started: float) -> Order:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise RefusedError(415, "send JSON, with the header `Content-Type: application/json`")
        try:
            async with asyncio.timeout(BODY_SEC):
                body = await body_of(request)
        except TimeoutError as error:
            raise RefusedError(408, "the body did not arrive in time; send it at once") from error
        order = parse_order(body)
        names = [name for name, _ in order.params.adapters]
        refs = tuple([await asyncio.to_thread(self.catalogue.find, name) for name in names])
        rest = self.request_timeout_sec - (time.monotonic() - started)
        return replace(order, adapters=refs, seconds=rest)

    def _retry_sec(self) -> int:
        """Seconds until about the next place is free."""
        return max(1, min(MOST_RETRY_SEC, math.ceil(self.seconds / max(1, self.max_inside))))

    async def adapters(self, request: Request) -> Response:
        return JSONResponse({"adapters": await asyncio.to_thread(self.catalogue.names)})

    async def healthz(self, request: Request) -> Response:
        """The base's facts from a replica. Raises RefusedError (503) when none answers."""
        try:
            async with asyncio.timeout(HEALTH_SEC):
                facts = await self.facts()
        except TimeoutError as error:
            raise RefusedError(503, "no replica answers", 5) from error
        return JSONResponse({"status": "ok", **facts})

    async def metrics(self, request: Request) -> Response:
        return Response(self.telemetry.text(), media_type=CONTENT_TYPE)


async def body_of(request: Request) -> bytes:
    """Raises RefusedError (413) as soon as the body or its declared length is too long."""
    promised = request.headers.get("content-length", "")
    body = b""
    if not (promised.isdigit() and len(promised) < 20 and int(promised) > MAX_BODY_BYTES):
        async for part in request.stream():
            body += part
            if len(body) > MAX_BODY_BYTES:
                break
        else:
            return body
    raise RefusedError(413, f"the body is too long; at most {MAX_BODY_BYTES // 1024} KiB are read")


def build_front(front: Front) -> Starlette:
    def guarded(endpoint: Callable[[Request], Awaitable[Response]]) -> Callable:
        async def checked(request: Request) -> Response:
            front.access.check(request.url.path, request.headers)
            return await endpoint(request)

        return checked

    routes = [
        Route("/generate", guarded(front.generate), methods=["POST"]),
        *(Route(f"/{name}", guarded(getattr(front, name))) for name in ("adapters", "healthz", "metrics")),
    ]
    handlers = {UserError: refused, HTTPException: no_such_path, Exception: failed}
    app = Starlette(routes=routes, exception_handlers=handlers)
    app.router.redirect_slashes = False  # a redirect would skip the checks of token and Host
    return app


async def refused(request: Request, error: UserError) -> Response:
    status = error.status if isinstance(error, RefusedError) else 400
    headers = {"WWW-Authenticate": "Bearer"} if status == 401 else {}
    if isinstance(error, RefusedError) and error.retry_sec is not None:
        headers["Retry-After"] = str(error.retry_sec)
    return JSONResponse({"error": one_line(error, 500)}, status, headers)


async def no_such_path(request: Request, error: HTTPException) -> Response:
    return JSONResponse({"error": f"{request.method} is not answered here; POST /generate draws"}, error.status_code)


async def failed(request: Request, error: Exception) -> Response:
    logger.error("A request failed", exc_info=error)
    return JSONResponse({"error": "something went wrong; the server's log says what"}, 500)
