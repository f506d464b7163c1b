"""What guards a page that strangers can reach; a page on the loopback does not load it.

- Turns: no visitor fills the queue alone, visitors take turns, work without a listener ends, and only so many runs of
  training wait. Events that stop or list something are not limited.
- Limits: after a few wrong passwords the login is closed for a while; what Gradio remembers of each session is small.
- Names: a session's name appears in addresses, so another browser must not read or end the session by it. An unknown
  function, component, session or job is answered with 404, where Gradio would raise a traceback.

All but the layers and `check_room` work through parts of Gradio that it does not promise to keep.
"""

import json
import re
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from itertools import count
from typing import Any
from urllib.parse import parse_qs
from weakref import WeakKeyDictionary

import fastapi
import gradio as gr
from gradio.blocks import Block
from gradio.server_messages import ProcessCompletedMessage
from gradio.state_holder import SessionState
from starlette.responses import PlainTextResponse

from dreambooth_moslora.core import UserError
from dreambooth_moslora.disk.queue import COMMAND_LINE, QueuedRun
from dreambooth_moslora.ui.visitors import Layer, Visitor, address_of, cookie_of, secret_in, visitor_id

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
ANY_FUNCTION = "predict"  # The name that Gradio uses for a function given by its number
ONE_RANGE = re.compile(rb"bytes=\d*-\d*")
"""Gradio handles only this form of range; a server may answer with the whole file (RFC 9110)."""


class UnknownNames(Layer):
    """Stands around Gradio's own application."""

    async def answer(self, scope: dict, receive: Any, send: Any) -> None:
        path, page = scope["path"].rstrip("/"), scope["app"].get_blocks()
        missing = _missing_name(path, scope, page)
        if not missing and scope["method"] == "POST" and BY_NUMBER.fullmatch(path):
            body, receive = await whole_body(receive)
            missing = _missing_number(body, page)
        if missing:
            await PlainTextResponse(f"there is no such {missing}", 404)(scope, receive, send)
            return
        headers = [pair for pair in scope["headers"] if pair[0] != b"range" or ONE_RANGE.fullmatch(pair[1])]
        await self.app(scope | {"headers": headers}, receive, send)


def _missing_name(path: str, scope: dict, page: Any) -> str:
    """What the path names and `page` lacks; "" for nothing."""
    queue = page._queue
    if path == STREAM:
        session = _streamed(scope)
        return "session" if session and session not in queue.pending_messages_per_session else ""
    if (found := ASKED.fullmatch(path)) and scope["method"] == "POST":
        names = {function.api_name for function in page.fns.values()} | {ANY_FUNCTION}
        return "" if found["name"] in names else "function"
    if (found := FETCHED.fullmatch(path)) and scope["method"] == "GET":
        known = (
            queue.event_ids_to_events,
            queue.pending_messages_per_session,
            *queue.pending_event_ids_session.values(),
        )
        return "" if any(found["event"] in events for events in known) else "job"
    return ""


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


class SessionGuard(Layer):
    """403 to requests for the stream or the end of another's session, and for a link to any."""

    async def answer(self, scope: dict, receive: Any, send: Any) -> None:
        path, session = scope["path"].rstrip("/"), ""
        if path == CANCEL:
            body, receive = await whole_body(receive)
            with suppress(ValueError, TypeError, KeyError, RecursionError):
                session = str(json.loads(body)["session_hash"])
        elif path == STREAM:
            session = _streamed(scope)
        if path == LINK or _owners.get(session, cookie_of(scope)) != cookie_of(scope):
            await PlainTextResponse(NOT_YOURS, 403)(scope, receive, send)
        else:
            await self.app(scope, receive, send)


def _streamed(scope: dict) -> str:
    return parse_qs(scope["query_string"].decode("latin1")).get("session_hash", [""])[0]


async def whole_body(receive: Any) -> tuple[bytes, Any]:
    """The body, whose length BodySizeLimit bounds, and a `receive` that begins with it again."""
    body, is_open = bytearray(), True
    while is_open:
        message = await receive()
        body += message.get("body", b"")
        is_open = message.get("more_body", False)
    messages = [{"type": "http.request", "body": bytes(body), "more_body": False}]

    async def replayed() -> dict:
        return messages.pop() if messages else await receive()

    return bytes(body), replayed


_put = SessionState.__setitem__


def _put_with_its_number(session: SessionState, number: int, value: Any) -> None:
    """Let sessions hold one component in each place. Gradio puts an updated one, which has a new number, in the old
    one's place and in its own: two more with each job, for as long as the session is remembered."""
    if isinstance(value, Block):
        value._id = number
    _put(session, number, value)


WINDOW_SEC = 300.0
TRIES_PER_ADDRESS = 10
TOGETHER = 100  # Limit for all addresses together: behind a proxy a client may send any address
TOO_MANY_TRIES = "too many wrong passwords; wait five minutes"


class LoginLimit(Layer):
    """429 to a login after TRIES_PER_ADDRESS wrong ones in WINDOW_SEC; existing logins go on."""

    def __init__(self, app: Any) -> None:
        super().__init__(app)
        self._tries: deque[tuple[float, str]] = deque()

    async def answer(self, scope: dict, receive: Any, send: Any) -> None:
        if scope["method"] != "POST" or scope["path"].rstrip("/") != "/login":
            await self.app(scope, receive, send)
            return
        address = (scope.get("client") or ("",))[0]
        while self._tries and time.monotonic() - self._tries[0][0] > WINDOW_SEC:
            self._tries.popleft()
        of_address = sum(other == address for _, other in self._tries)
        if len(self._tries) >= TOGETHER or of_address >= TRIES_PER_ADDRESS:
            await PlainTextResponse(TOO_MANY_TRIES, 429)(scope, receive, send)
            return
        attempt = (time.monotonic(), address)  # counted at once, as many may be sent together
        self._tries.append(attempt)

        async def send_and_forgive(message: dict) -> None:
            if message["type"] == "http.response.start" and message["status"] < 400 and attempt in self._tries:
                self._tries.remove(attempt)
            await send(message)

        await self.app(scope, receive, send_and_forgive)


PLACES = 64
PER_VISITOR = 8
STRANGERS = 24
"""Limit for all at one address who had no turn: cookies can be invented, so each job may look like a new visitor."""
JOBS_PER_ADDRESS = 48  # Limit for all at one address without a login
TURNS_TOGETHER = 4
"""Turns of an address, without a login, between two of another: one visitor may hold many cookies that had one each."""
MOST_REMEMBERED = 10_000
TOO_MANY_JOBS = "{} jobs from here are waiting already; wait until one is done, or stop it"
UNHEARD_SEC = 30.0
UNHEARD = "the work was dropped, as nobody fetched its results"
FULL = "the queue is full; try again in a while"


class Turns:
    """Whose turn it is: `served` has the number of each visitor's last turn, `places` those of the last turns at an
    address without a login. Visitors there who had no turn share one, or invented cookies would always be first."""

    def __init__(self) -> None:
        self.served: OrderedDict[str, int] = OrderedDict()
        self.places: OrderedDict[str, deque[int]] = OrderedDict()
        self._numbers = count(1)

    def _name_of(self, asker: gr.Request) -> str:
        visitor = visitor_id(asker)
        return visitor if asker.username or visitor in self.served else f"strangers at {address_of(asker)}"

    def note(self, asker: gr.Request) -> None:
        number = next(self._numbers)
        for name in {self._name_of(asker), visitor_id(asker)}:
            self.served[name] = number
            self.served.move_to_end(name)
        if not asker.username:
            self.places.setdefault(address_of(asker), deque(maxlen=TURNS_TOGETHER)).append(number)
            self.places.move_to_end(address_of(asker))
        for remembered in (self.served, self.places):
            while len(remembered) > MOST_REMEMBERED:
                remembered.popitem(last=False)

    def in_order(self, jobs: list, askers: list[gr.Request]) -> list:
        """Each visitor's first job, then each one's second, and so on; in a round, the oldest last turn goes first.
        That is the number of the visitor's own, or of the one TURNS_TOGETHER ago at the address if later; 0: none."""
        earlier, ranks = Counter(), []
        for place, asker in enumerate(askers):
            name = self._name_of(asker)
            last, turns = self.served.get(name, 0), () if asker.username else self.places.get(address_of(asker), ())
            ranks.append((earlier[name], max(last, turns[0]) if len(turns) == TURNS_TOGETHER else last, place))
            earlier[name] += 1
        return [jobs[place] for _, _, place in sorted(ranks)]

    def shares(self, asker: gr.Request) -> dict[tuple[str, str], int]:
        """Everything that a job of this visitor counts against, with the number of jobs that may wait there."""
        visitor, address = visitor_id(asker), address_of(asker)
        shares = {("visitor", visitor): PER_VISITOR}
        if not asker.username:
            shares["address", address] = JOBS_PER_ADDRESS
            if visitor not in self.served:
                shares["strangers", address] = STRANGERS
        return shares


class FairQueue:
    """Its methods stand in the place of those of the page's queue, which they call: limits, order, owners."""

    def __init__(self, page: gr.Blocks) -> None:
        self.page, self.queue, self.turns = page, page._queue, Turns()
        self._push, self._take, self._send = self.queue.push, self.queue.get_events, self.queue.send_message
        self._heard: WeakKeyDictionary[Any, float] = WeakKeyDictionary()
        self.queue.push, self.queue.get_events = self.push, self.get_events
        self.queue.send_message = self.send_message
        SessionState.__setitem__ = _put_with_its_number

    async def push(self, body: Any, request: fastapi.Request, username: str | None) -> tuple:
        """Records the session's owner, 403 for another's; 429 for a visitor with too many jobs, 503 without a place. An
        event with queue=False that a client sends to the queue competes only with its own kind."""
        if session := body.session_hash:
            cookie = secret_in(request.cookies)
            if _owners.get(session, cookie) != cookie:
                raise fastapi.HTTPException(403, NOT_YOURS)
            if cookie:
                _owners.setdefault(session, cookie)
            while len(_owners) > MOST_OWNERS:
                _owners.popitem(last=False)
        function, lanes = self.page.fns.get(body.fn_index), self.queue.event_queue_per_concurrency_id
        if function is not None:
            waiting = [event for lane in lanes.values() for event in lane.queue]
            rivals = [e for e in waiting if e.fn is function or (e.fn.queue and function.queue)]
            taken = [self.turns.shares(_asker_of(event)) for event in rivals]
            asker = gr.Request(request, username=username, session_hash=session)
            for share, limit in self.turns.shares(asker).items():
                if sum(share in others for others in taken) >= limit:
                    raise fastapi.HTTPException(429, TOO_MANY_JOBS.format(limit))
            if len(rivals) >= PLACES:
                return False, FULL, "queue_full"
        answer = await self._push(body, request, username)
        for lane in lanes.values():
            self._order(lane.queue)
        return answer

    def get_events(self) -> tuple | None:
        if taken := self._take():
            events, _, lane = taken
            for event in events:
                self.turns.note(_asker_of(event))
            self._order(self.queue.event_queue_per_concurrency_id[lane].queue)
        return taken

    def _order(self, jobs: list) -> None:
        jobs[:] = self.turns.in_order(jobs, [_asker_of(event) for event in jobs])

    def send_message(self, event: Any, message: Any) -> None:
        """Drops a job that nobody has listened to for 30 s; Gradio itself drops only that of a listener who leaves."""
        unread = self.queue.pending_messages_per_session.get(event.session_hash)
        if unread is None or unread.empty():
            self._heard[event] = time.monotonic()
        self._send(event, message)
        if time.monotonic() - self._heard.setdefault(event, time.monotonic()) > UNHEARD_SEC and event.alive:
            self._send(event, ProcessCompletedMessage(output={"error": UNHEARD}, success=False, title="Left"))
            event.alive = False


def fetch_nothing(page: gr.Blocks) -> None:
    """A form may name an address in the place of a file: Gradio would fetch it, however long, beside all limits."""
    for block in page.blocks.values():
        block.async_move_resource_to_block_cache = partial(_of_this_machine, block.async_move_resource_to_block_cache)


async def _of_this_machine(keep: Callable, path: str | None) -> str | None:
    if path and path.lower().startswith(("http://", "https://")):
        raise gr.Error("Send the file itself: the page fetches no address.", print_exception=False)
    return await keep(path)


def _asker_of(event: Any) -> gr.Request:
    return gr.Request(event.request, username=event.username, session_hash=event.session_hash)


LAYERS = (LoginLimit, SessionGuard, UnknownNames)
