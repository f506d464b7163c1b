"""Answers 404 with a message for an unknown function, component, session or job, where Gradio would raise a
traceback."""

import json
import re
from typing import Any
from urllib.parse import parse_qs

from starlette.responses import PlainTextResponse

from dreambooth_moslora.ui.server.session_guard import STREAM, body_again, whole_body

__all__ = ["UnknownNames"]

API = "/gradio_api"
ASKED = re.compile(rf"{API}/(run|api|call/v2|call)/(?P<name>[^/]+)")
FETCHED = re.compile(rf"{API}/call/(v2/)?[^/]+/(?P<event>[^/]+)")
BY_NUMBER = re.compile(rf"{API}/(run/predict|api/predict|queue/join|component_server)")
ANY_FUNCTION = "predict"
"""The name that Gradio uses for a function given by its number."""
ONE_RANGE = re.compile(rb"bytes=\d*-\d*")
"""Gradio handles only this form of range; a server may answer with the whole file (RFC 9110)."""


class UnknownNames:
    """ASGI middleware around Gradio's own application."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path, page = scope["path"].rstrip("/"), scope["app"].get_blocks()
        missing = _missing_name(path, scope, page)
        if not missing and scope["method"] == "POST" and BY_NUMBER.fullmatch(path):
            body = await whole_body(receive)
            missing, receive = _missing_number(body, page), body_again(body, receive)
        if missing:
            await PlainTextResponse(f"there is no such {missing}", 404)(scope, receive, send)
            return
        headers = [pair for pair in scope["headers"] if pair[0] != b"range" or ONE_RANGE.fullmatch(pair[1])]
        await self.app(scope | {"headers": headers}, receive, send)


def _missing_name(path: str, scope: dict, page: Any) -> str:
    """What the path names and `page` lacks; "" for nothing."""
    if path == STREAM:
        session = parse_qs(scope["query_string"].decode("latin1")).get("session_hash", [""])[0]
        return "session" if session and session not in page._queue.pending_messages_per_session else ""
    if (found := ASKED.fullmatch(path)) and scope["method"] == "POST":
        names = {function.api_name for function in page.fns.values()} | {ANY_FUNCTION}
        return "" if found["name"] in names else "function"
    if (found := FETCHED.fullmatch(path)) and scope["method"] == "GET":
        return "" if _is_job(found["event"], page._queue) else "job"
    return ""


def _is_job(event: str, queue: Any) -> bool:
    is_pending = any(event in events for events in queue.pending_event_ids_session.values())
    return is_pending or event in queue.event_ids_to_events or event in queue.pending_messages_per_session


def _missing_number(body: bytes, page: Any) -> str:
    """What the body names by number and `page` lacks; Gradio itself refuses a malformed body with a message."""
    try:
        values = dict(json.loads(body))
    except (ValueError, TypeError, RecursionError):
        return ""
    function, component = values.get("fn_index"), values.get("component_id")
    if isinstance(function, int) and function not in page.fns:
        return "function"
    if component is not None and (not isinstance(component, int) or component not in page.blocks):
        return "component"
    return ""
