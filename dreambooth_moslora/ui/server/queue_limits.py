"""Nobody fills the queue alone, work that nobody listens to ends, and what stops or lists something needs no place."""

import time
from typing import Any
from weakref import WeakKeyDictionary

import fastapi
import gradio as gr
from gradio.server_messages import ProcessCompletedMessage

from dreambooth_moslora.ui.server.users import secret_in, visitor_id

__all__ = ["PER_ADDRESS", "PER_VISITOR", "PLACES", "STRANGERS", "UNHEARD_SEC", "drop_unheard", "limit_waiting"]

PLACES = 64
PER_VISITOR = 8
STRANGERS = 24
"""Of all who send neither a login nor a cookie from one address: each of their jobs may look like a new visitor."""
PER_ADDRESS = 48
"""A cookie can be made up, too."""
TOO_MANY = "{} jobs from here are waiting already; wait until one is done, or stop it"
UNHEARD_SEC = 30.0
UNHEARD = "the work was left, as nobody listened to it"
FULL = "the queue is full; try again in a while"


def limit_waiting(page: gr.Blocks) -> None:
    """Let the queue of `page`, itself without a limit, refuse what would be too many waiting jobs.

    429 for a visitor who has too many, 503 when all places are taken. An event that is declared with queue=False,
    which a client sends to the queue nevertheless, competes with its like alone.
    """
    queue = page._queue
    push = queue.push

    async def limited_push(body: Any, request: fastapi.Request, username: str | None) -> tuple:
        function = page.fns.get(body.fn_index)
        if function is not None:
            rivals = [event for event in _waiting(queue) if _compete(event.fn, function)]
            _refuse_more(rivals, gr.Request(request, username=username, session_hash=body.session_hash))
            if len(rivals) >= PLACES:
                return False, FULL, "queue_full"
        return await push(body, request, username)

    queue.push = limited_push


def drop_unheard(page: gr.Blocks) -> None:
    """Let the queue of `page` leave a job whose messages nobody has fetched for 30 s.

    Gradio itself leaves the work of a listener who goes away, but not of one who never came.
    """
    queue, heard = page._queue, WeakKeyDictionary()
    send = queue.send_message

    def send_if_heard(event: Any, message: Any) -> None:
        unread = queue.pending_messages_per_session.get(event.session_hash)
        if unread is None or unread.empty():
            heard[event] = time.monotonic()
        send(event, message)
        if time.monotonic() - heard.setdefault(event, time.monotonic()) > UNHEARD_SEC and event.alive:
            send(event, ProcessCompletedMessage(output={"error": UNHEARD}, success=False, title="Left"))
            event.alive = False

    queue.send_message = send_if_heard


def _compete(one: Any, other: Any) -> bool:
    return one is other or (one.queue and other.queue)


def _waiting(queue: Any) -> list:
    return [event for events in queue.event_queue_per_concurrency_id.values() for event in events.queue]


def _refuse_more(rivals: list, asker: gr.Request) -> None:
    shares = [_shares(_asker_of(event)) for event in rivals]
    for share, limit in _shares(asker).items():
        if sum(share in others for others in shares) >= limit:
            raise fastapi.HTTPException(429, TOO_MANY.format(limit))


def _asker_of(event: Any) -> gr.Request:
    return gr.Request(event.request, username=event.username, session_hash=event.session_hash)


def _shares(asker: gr.Request) -> dict[tuple[str, str], int]:
    """Everything that a job of this asker counts against, with the number of jobs that may wait there."""
    address = asker.client.host if asker.client else ""
    shares = {("visitor", visitor_id(asker)): PER_VISITOR, ("address", address): PER_ADDRESS}
    if not (asker.username or secret_in(asker.cookies)):
        shares["strangers", address] = STRANGERS
    return shares
