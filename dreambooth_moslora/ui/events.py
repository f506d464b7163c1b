"""How the page's events are connected: which wait, what is shown meanwhile, how errors are told.

@on(button.click, TELLING, inputs=…, outputs=…)
def handler(…): …

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
"""Options of every event that computes: one at a time, the others wait in one queue."""
UNQUEUED_EVENT = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
"""Options of small events outside the queue, whose errors and remarks the page does not show: they
must not raise."""
MESSAGE_EVENT = {"concurrency_limit": None, "show_progress": "hidden", "api_visibility": "private"}
"""Options of small events with a message: errors and remarks reach the page only through the queue.
"""

MAX_MESSAGE_CHARACTERS = 300
"""Characters of a message on the page."""
DISK_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of the system when nothing more can be written."""


@contextmanager
def _show_errors() -> Iterator[None]:
    """Raises gr.Error, which gradio shows on the page, for any error inside."""
    try:
        yield
    except gr.Error:
        raise
    except Exception as error:
        words = html.escape(format_message(convert_to_user_error(error)), quote=False)
        raise gr.Error(words, duration=12, print_exception=False) from error


def on(
    trigger: Callable | list[Callable], kind: Mapping[str, Any] | None = None, **options: Any
) -> Callable:
    """A decorator: connects a handler to an event of the page, or to several.

    - `trigger` is gradio's, such as `button.click`; of several any may begin it.
    - `kind` is one of the options above.
    - `options` are further options of gradio's, such as `inputs` and `outputs`.

    The handler's errors become messages (`wrap_errors`).
    """
    listen = trigger if callable(trigger) else partial(gr.on, trigger)

    def connect(handler: Callable) -> Any:
        return listen(wrap_errors(handler), **((kind or {}) | options))

    return connect


def wrap_errors(handler: Callable) -> Callable:
    """A decorator: a handler's error becomes a message on the page (`convert_to_user_error`),
    escaped."""
    if not inspect.isgeneratorfunction(handler):
        return _show_errors()(handler)

    @functools.wraps(handler)
    def run_guarded(*args, **kwargs):
        with _show_errors():
            yield from handler(*args, **kwargs)

    return run_guarded


def render_mistake(error: Exception, translate: Callable[[str], str] = str) -> str:
    """The message of a handler's error as HTML, for a handler that shows it among its values.
    `in_words` says it in the words of a form."""
    return render_notice(translate(format_message(convert_to_user_error(error))), "bad")


def convert_to_user_error(error: Exception) -> UserError:
    """What the user is told of an error.

    A UserError is told unchanged, and a full disk by name. Any other error is a bug: it goes to the
    log, and the message refers to that.
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
