"""Connecting of the page's events: queueing, progress and error messages.

@on(button.click, MESSAGE_EVENT, inputs=…, outputs=…)\n    def handler(…): …
"""

import errno
import functools
import html
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import gradio as gr

from dreambooth_moslora.errors import UserError, format_error
from dreambooth_moslora.ui.html import render_notice

logger = logging.getLogger(__name__)

GPU_EVENT = {"concurrency_id": "gpu", "concurrency_limit": 1}
"""Options of every event that needs the GPU: one at a time, the others wait in one queue."""
UNQUEUED_EVENT = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
"""Options of small events outside the queue. They must not raise: the page shows neither errors nor
remarks of them."""
MESSAGE_EVENT = {"concurrency_limit": None, "show_progress": "hidden", "api_visibility": "private"}
"""Options of small events with a message: only through the queue do errors reach the page."""
MAX_MESSAGE_CHARACTERS = 300
"""Characters of a message on the page."""
DISK_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Error numbers of the system when nothing more can be written."""


@contextmanager
def _show_errors() -> Iterator[None]:
    """Raise any error inside the block as gr.Error, which gradio shows on the page."""
    try:
        yield
    except gr.Error:
        raise
    except Exception as error:
        message = html.escape(format_message(convert_to_user_error(error)), quote=False)
        raise gr.Error(message, duration=12, print_exception=False) from error


def on(
    trigger: Callable | list[Callable], kind: Mapping[str, Any] | None = None, **options: Any
) -> Callable:
    """Return a decorator that connects a handler to an event of the page, or to several.

    - `trigger` is gradio's, such as `button.click`; with several, any of them starts the handler.
    - `kind` is one of the options above.
    - `options` are further options of gradio's, such as `inputs` and `outputs`.

    The handler's errors become messages (`wrap_errors`).
    """
    listen = trigger if callable(trigger) else partial(gr.on, trigger)

    def connect(handler: Callable) -> Any:
        return listen(wrap_errors(handler), **((kind or {}) | options))

    return connect


def wrap_errors(handler: Callable) -> Callable:
    """Decorate a handler so that its error becomes an escaped message on the page."""
    if not inspect.isgeneratorfunction(handler):
        return _show_errors()(handler)

    @functools.wraps(handler)
    def run_guarded(*args, **kwargs):
        with _show_errors():
            yield from handler(*args, **kwargs)

    return run_guarded


def get_event_value(event: gr.EventData, name: str) -> str:
    """Return the value that the page's script sends with an event; "" if it sends none."""
    return str(event._data.get(name)) if isinstance(event._data, dict) else ""


def render_mistake(error: Exception, translate: Callable[[str], str] = str) -> str:
    """Return an error's message as HTML, for a handler that shows it among its values. `translate`
    rewrites it in the words of a form.
    """
    return render_notice(translate(format_message(convert_to_user_error(error))), "bad")


def convert_to_user_error(error: Exception) -> UserError:
    """Return the error that the user is shown.

    A UserError is returned unchanged, and a full disk is named. Any other error is a bug: it goes
    to the log, to which the message refers.
    """
    if isinstance(error, UserError):
        return error
    if isinstance(error, OSError) and error.errno in DISK_FULL_ERRNOS:
        return UserError("the server's disk is full; free some space and try again")
    logger.error("A handler of the page failed", exc_info=error)
    return UserError("something went wrong; the server's log says what")


def format_message(error: Exception | str) -> str:
    """Return the text of an error or a remark in one line, capitalised unless it begins with a
    file's name."""
    # It may quote half a surrogate pair, which the server cannot send.
    text = format_error(error, MAX_MESSAGE_CHARACTERS).encode("utf-8", "replace").decode()
    is_file_name = "." in text.partition(" ")[0].rstrip(".:")
    return text if is_file_name else text[:1].upper() + text[1:]
