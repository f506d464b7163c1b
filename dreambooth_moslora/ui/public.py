"""What guards a page that strangers can reach; a page on the loopback does not load it.

- Turns: no visitor fills the queue alone, visitors take turns, work without a listener ends, and only so many runs of
  training wait. Events that stop or list something are not limited.
- Limits: after a few wrong passwords the login is closed for a while. What Gradio remembers of each session (a page in
  a browser, until the server ends) stays small.
- Names: a session's name appears in addresses, so it is no secret, and another browser must not read or end the session
  by it. An unknown function, component, session or job is answered with 404, where Gradio would raise a traceback.

All but the layers and `check_room` work through parts of Gradio that it does not promise to keep.
"""

import json
import re
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Mapping, Sequence
from itertools import count
from typing import Any
from urllib.parse import parse_qs
from weakref import WeakKeyDictionary

import fastapi
import gradio as gr
from gradio.blocks import Block
from gradio.server_messages import ProcessCompletedMessage
from gradio.state_holder import SessionState
from starlette.requests import cookie_parser
from starlette.responses import PlainTextResponse

from dreambooth_moslora.core import UserError
from dreambooth_moslora.disk.queue import COMMAND_LINE, QueuedRun
from dreambooth_moslora.ui.guard import header_of
from dreambooth_moslora.ui.visitors import Visitor, address_of, secret_in, visitor_id

RUNS_PER_VISITOR, RUNS_PER_ADDRESS, RUNS_IN_ALL = 20, 40, 100
"""Runs that may wait: of a visitor, of all visitors at one address without a login, and of the whole page."""


def check_room(waiting: Sequence[QueuedRun], visitor: Visitor) -> None:
    """Raise UserError when as many runs wait as may. Runs that were added by command do not count."""
    if sum(run.owner == visitor.id for run in waiting) >= RUNS_PER_VISITOR:
        raise UserError(f"{RUNS_PER_VISITOR} runs of yours are waiting; remove one, or wait")
    if visitor.address and sum(run.address == visitor.address for run in waiting) >= RUNS_PER_ADDRESS:
        raise UserError(f"{RUNS_PER_ADDRESS} runs from your address are waiting; wait until one has ended")
    if sum(run.owner != COMMAND_LINE for run in waiting) >= RUNS_IN_ALL:
        raise UserError(f"the queue is full, {RUNS_IN_ALL} runs are waiting; wait until one has ended")


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


STREAM, CANCEL, LINK = "/gradio_api/queue/data", "/gradio_api/cancel", "/gradio_api/deep_link"
MOST_OWNERS = 10_000
NOT_YOURS = "this session is another browser's"
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
                raise fastapi.HTTPException(403, NOT_YOURS)
            _note(body.session_hash, cookie)
        return await push(body, request, username)

    queue.push = noted_push


def _note(session: str, cookie: str) -> None:
    if cookie:
        _owners.setdefault(session, cookie)
    while len(_owners) > MOST_OWNERS:
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
            await PlainTextResponse(NOT_YOURS, 403)(scope, receive, send)
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


_put = SessionState.__setitem__


def _put_with_its_number(session: SessionState, number: int, value: Any) -> None:
    """Let sessions hold one component in each place, however often it is updated.

    Gradio puts an updated component, which has a new number, in the old one's place, and by its next value in the new
    number's place as well: two components more with each job, for as long as the session is remembered.
    """
    if isinstance(value, Block):
        value._id = number
    _put(session, number, value)


WINDOW_SEC = 300.0
TRIES_PER_ADDRESS = 10
TOGETHER = 100
"""Limit for all addresses together: behind a proxy a client may send any address."""
TOO_MANY_TRIES = "too many wrong passwords; wait five minutes"


class LoginLimit:
    """ASGI middleware: answers 429 to a login after PER_ADDRESS wrong ones in WINDOW_SEC. Existing logins are
    not affected."""

    def __init__(self, app: Any) -> None:
        self.app = app
        self._tries: deque[tuple[float, str]] = deque()

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or scope["path"].rstrip("/") != "/login":
            await self.app(scope, receive, send)
            return
        address = (scope.get("client") or ("",))[0]
        if self._is_closed(address):
            await PlainTextResponse(TOO_MANY_TRIES, 429)(scope, receive, send)
            return
        attempt = (time.monotonic(), address)  # counted at once, as many may be sent together
        self._tries.append(attempt)

        async def send_and_forgive(message: dict) -> None:
            if message["type"] == "http.response.start" and message["status"] < 400 and attempt in self._tries:
                self._tries.remove(attempt)
            await send(message)

        await self.app(scope, receive, send_and_forgive)

    def _is_closed(self, address: str) -> bool:
        while self._tries and time.monotonic() - self._tries[0][0] > WINDOW_SEC:
            self._tries.popleft()
        return len(self._tries) >= TOGETHER or sum(other == address for _, other in self._tries) >= TRIES_PER_ADDRESS


PLACES = 64
PER_VISITOR = 8
STRANGERS = 24
"""Limit for all at one address who have had no turn: cookies can be invented, so each job may look like a new
visitor."""
JOBS_PER_ADDRESS = 48
"""Limit for all at one address without a login."""
TURNS_TOGETHER = 4
"""For all at one address without a login, turns between two turns of another address: one visitor may hold many
cookies that had a turn each."""
MOST_REMEMBERED = 10_000
TOO_MANY_JOBS = "{} jobs from here are waiting already; wait until one is done, or stop it"
UNHEARD_SEC = 30.0
UNHEARD = "the work was dropped, as nobody fetched its results"
FULL = "the queue is full; try again in a while"


def protect(page: gr.Blocks) -> None:
    """Give the queue of `page` its limits and its order, and its sessions their owners and a small memory."""
    served: OrderedDict[str, int] = OrderedDict()
    take_turns(page, served)
    limit_waiting(page, served)
    drop_unheard(page)
    note_sessions(page)
    SessionState.__setitem__ = _put_with_its_number


def take_turns(page: gr.Blocks, served: OrderedDict[str, int]) -> None:
    """Make the queue of `page` serve the visitors in rotation, however many jobs each has waiting.

    `served` is filled: visitor -> the number of the last turn. Visitors at one address who had no turn share
    one, or invented cookies would always be first.
    """
    queue, places = page._queue, OrderedDict()
    push, take, numbers = queue.push, queue.get_events, count(1)

    def order(jobs: list) -> None:
        askers = [_asker_of(event) for event in jobs]
        last = [_last_turn(asker, served, places) for asker in askers]
        jobs[:] = in_rotation(jobs, [_turn_of(asker, served) for asker in askers], last)

    async def push_in_order(*arguments: Any) -> tuple:
        answer = await push(*arguments)
        for lane in queue.event_queue_per_concurrency_id.values():
            order(lane.queue)
        return answer

    def take_next() -> tuple | None:
        if taken := take():
            events, _, lane = taken
            for asker in map(_asker_of, events):
                _note_turn(asker, next(numbers), served, places)
            order(queue.event_queue_per_concurrency_id[lane].queue)
        return taken

    queue.push, queue.get_events = push_in_order, take_next


def in_rotation(jobs: list, owners: list[str], last_turns: Sequence[int]) -> list:
    """Each owner's first job, then each one's second, and so on; in a round, the owner whose last turn is
    oldest goes first."""
    earlier, ranks = Counter(), []
    for number, (owner, last) in enumerate(zip(owners, last_turns, strict=True)):
        ranks.append((earlier[owner], last, number))
        earlier[owner] += 1
    return [jobs[number] for _, _, number in sorted(ranks)]


def _note_turn(asker: gr.Request, number: int, served: OrderedDict[str, int], places: OrderedDict[str, deque]) -> None:
    for name in {_turn_of(asker, served), visitor_id(asker)}:
        served[name] = number
        served.move_to_end(name)
    if not asker.username:
        places.setdefault(address_of(asker), deque(maxlen=TURNS_TOGETHER)).append(number)
        places.move_to_end(address_of(asker))
    for remembered in (served, places):
        while len(remembered) > MOST_REMEMBERED:
            remembered.popitem(last=False)


def _last_turn(asker: gr.Request, served: Mapping[str, int], places: Mapping[str, deque]) -> int:
    """The number of the visitor's own last turn, or of the one TURNS_TOGETHER ago at the address if later; 0: none."""
    own = served.get(_turn_of(asker, served), 0)
    turns = () if asker.username else places.get(address_of(asker), ())
    return max(own, turns[0]) if len(turns) == TURNS_TOGETHER else own


def _turn_of(asker: gr.Request, served: Mapping[str, int]) -> str:
    visitor = visitor_id(asker)
    return visitor if asker.username or visitor in served else f"strangers at {address_of(asker)}"


def limit_waiting(page: gr.Blocks, served: Mapping[str, int]) -> None:
    """Make the queue of `page`, which itself has no limit, refuse too many waiting jobs.

    429 for a visitor with too many, 503 when all places are taken. An event that is declared with queue=False,
    but sent to the queue by a client, competes only with its own kind.
    """
    queue = page._queue
    push = queue.push

    async def limited_push(body: Any, request: fastapi.Request, username: str | None) -> tuple:
        function = page.fns.get(body.fn_index)
        if function is not None:
            waiting = [event for events in queue.event_queue_per_concurrency_id.values() for event in events.queue]
            rivals = [e for e in waiting if e.fn is function or (e.fn.queue and function.queue)]
            asker = gr.Request(request, username=username, session_hash=body.session_hash)
            _refuse_more(rivals, asker, served)
            if len(rivals) >= PLACES:
                return False, FULL, "queue_full"
        return await push(body, request, username)

    queue.push = limited_push


def drop_unheard(page: gr.Blocks) -> None:
    """Make the queue of `page` drop a job whose messages were not fetched for 30 s.

    Gradio itself drops the work of a listener who leaves, but not of one who never came.
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


def _refuse_more(rivals: list, asker: gr.Request, served: Mapping[str, int]) -> None:
    shares = [_shares(_asker_of(event), served) for event in rivals]
    for share, limit in _shares(asker, served).items():
        if sum(share in others for others in shares) >= limit:
            raise fastapi.HTTPException(429, TOO_MANY_JOBS.format(limit))


def _asker_of(event: Any) -> gr.Request:
    return gr.Request(event.request, username=event.username, session_hash=event.session_hash)


def _shares(asker: gr.Request, served: Mapping[str, int]) -> dict[tuple[str, str], int]:
    """Everything that a job of this visitor counts against, with the number of jobs that may wait there."""
    visitor, address = visitor_id(asker), address_of(asker)
    shares = {("visitor", visitor): PER_VISITOR}
    if not asker.username:
        shares["address", address] = JOBS_PER_ADDRESS
        if visitor not in served:
            shares["strangers", address] = STRANGERS
    return shares


LAYERS = (LoginLimit, SessionGuard, UnknownNames)
