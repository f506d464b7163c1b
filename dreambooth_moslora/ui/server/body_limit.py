"""Limits the length of requests, which are held in memory. Only files of uploads, which gradio writes to the
disk, may be long."""

from typing import Any

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.formparsers import MultiPartException
from starlette.responses import PlainTextResponse

__all__ = ["MAX_BODY_BYTES", "MAX_UPLOAD_BYTES", "UPLOAD", "BodySizeLimit", "header_of", "promised_bytes"]

UPLOAD, FILES = "/gradio_api/upload", b"files"
"""Path of an upload, and the name of the form's field that holds its files: gradio has no answer to a text there."""
MAX_BODY_BYTES = 4 * 1024**2
"""Far more than any form of the page needs; parsing takes several times as much memory."""
MAX_UPLOAD_BYTES = 512 * 1024**2
"""Limit of all files of one upload together."""


class BodySizeLimit:
    """ASGI middleware: answers 413 when the declared length is too long, and cuts off a body that exceeds the limit.

    Files may make an upload longer by MAX_UPLOAD_BYTES. If it ends early its files are deleted.
    """

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        is_upload = scope["path"] == UPLOAD
        if promised_bytes(scope) > MAX_BODY_BYTES + MAX_UPLOAD_BYTES * is_upload:
            await PlainTextResponse("too long; files are sent to /upload", 413)(scope, receive, send)
        else:
            await self.app(scope, _watched(receive, scope) if is_upload else _counted(receive), send)


def header_of(scope: dict, wanted: bytes) -> bytes:
    return next((value for name, value in scope["headers"] if name == wanted), b"")


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
    """`receive` that raises MultiPartException when an upload is too long or its sender leaves early.

    At that error gradio deletes what it has written so far.
    """
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
    """Counts the bytes of a form that belong to no file, which gradio keeps in memory. Raises MultiPartException
    for a text among the files."""

    def __init__(self, content_type: bytes) -> None:
        self.field_bytes = 0
        self._name, self._value, self._is_file = bytearray(), bytearray(), False
        boundary = parse_options_header(content_type)[1].get(b"boundary")
        self._parser = MultipartParser(boundary, self._callbacks()) if boundary else None

    def _callbacks(self) -> dict[str, Any]:
        return {
            "on_part_begin": self._begin_part,
            "on_header_field": lambda data, start, end: self._name.extend(data[start:end]),
            "on_header_value": lambda data, start, end: self._value.extend(data[start:end]),
            "on_header_end": self._end_header,
            "on_part_data": self._count,
        }

    def write(self, data: bytes) -> None:
        """Ignores unreadable data: gradio refuses it with a message."""
        try:
            if self._parser:
                self._parser.write(data)
        except FormParserError:
            self._parser = None

    def _begin_part(self) -> None:
        self._is_file = False

    def _end_header(self) -> None:
        if self._name.lower() == b"content-disposition":
            options = parse_options_header(bytes(self._value))[1]
            self._is_file = b"filename" in options
            if options.get(b"name") == FILES and not self._is_file:
                raise MultiPartException(f"A part of {FILES.decode()} is no file.")
        self._name.clear()
        self._value.clear()

    def _count(self, data: bytes, start: int, end: int) -> None:
        if not self._is_file:
            self.field_bytes += end - start
