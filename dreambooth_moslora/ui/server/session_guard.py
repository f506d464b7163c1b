"""A session's name appears in addresses, so it is no secret: another browser must not read or end the session by it."""

import json
from collections import OrderedDict
from typing import Any
from urllib.parse import parse_qs

import fastapi
import gradio as gr
from starlette.requests import cookie_parser
from starlette.responses import PlainTextResponse

from dreambooth_moslora.ui.server.body_limit import header_of
from dreambooth_moslora.ui.server.users import secret_in

__all__ = ["STREAM", "SessionGuard", "body_again", "note_sessions", "whole_body"]

STREAM, CANCEL, LINK = "/gradio_api/queue/data", "/gradio_api/cancel", "/gradio_api/deep_link"
MAX_SESSIONS = 10_000
REFUSED = "this session is another browser's"
_owners: OrderedDict[str, str] = OrderedDict()
"""Session -> the cookie of the browser that began it. Names are random, so servers of one process may share it."""


def note_sessions(page: gr.Blocks) -> None:
    """Make the queue of `page` record each session's owner; 403 for a job in another's."""
    queue = page._queue
    push = queue.push

    async def noted_push(body: Any, request: Any, username: str | None) -> tuple:
        if body.session_hash:
            cookie = secret_in(request.cookies)
            if _owners.get(body.session_hash, cookie) != cookie:
                raise fastapi.HTTPException(403, REFUSED)
            _note(body.session_hash, cookie)
        return await push(body, request, username)

    queue.push = noted_push


def _note(session: str, cookie: str) -> None:
    if cookie:
        _owners.setdefault(session, cookie)
    while len(_owners) > MAX_SESSIONS:
        _owners.popitem(last=False)


class SessionGuard:
    """ASGI middleware: answers 403 to requests for the stream or the end of another's session, and for a link
    to any."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        path, session = scope["path"].rstrip("/") if scope["type"] == "http" else "", ""
        if path == CANCEL:
            body = await whole_body(receive)
            session, receive = _session_in(body), body_again(body, receive)
        elif path == STREAM:
            session = parse_qs(scope["query_string"].decode("latin1")).get("session_hash", [""])[0]
        if path == LINK or _owners.get(session, _cookie_of(scope)) != _cookie_of(scope):
            await PlainTextResponse(REFUSED, 403)(scope, receive, send)
        else:
            await self.app(scope, receive, send)


def _cookie_of(scope: dict) -> str:
    return secret_in(cookie_parser(header_of(scope, b"cookie").decode("latin1"))) if "headers" in scope else ""


async def whole_body(receive: Any) -> bytes:
    """The body, whose length BodySizeLimit bounds."""
    body, is_open = bytearray(), True
    while is_open:
        message = await receive()
        body += message.get("body", b"")
        is_open = message.get("more_body", False)
    return bytes(body)


def body_again(body: bytes, receive: Any) -> Any:
    """`receive` that begins with the body that has been read."""
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> dict:
        return messages.pop() if messages else await receive()

    return replayed


def _session_in(body: bytes) -> str:
    try:
        return str(json.loads(body)["session_hash"])
    except (ValueError, TypeError, KeyError, RecursionError):
        return ""
