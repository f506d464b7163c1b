"""A public page is shared: nobody fills its queue alone, hears another's session or guesses passwords; a local page
has none of these guards."""

import json
import secrets
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import pytest
from gradio_client import Client

from dreambooth_moslora.core import UserError
from dreambooth_moslora.ui import public
from dreambooth_moslora.ui.public import PER_VISITOR, STRANGERS, TURNS_TOGETHER, Turns
from dreambooth_moslora.ui.visitors import visitor_id
from tests.helpers.ui_server import cookie_of, serve
from tests.ui.conftest import asker, event_of, foreign_run, refusal, wait_for


@pytest.fixture
def busy(served, monkeypatch):
    """Nothing that computes comes to an end until the test does, and then at once."""
    go_on = threading.Event()

    def wait_and_fail():
        go_on.wait(60)
        raise UserError("the test is over")

    monkeypatch.setattr(served.ctx, "pipeline", wait_and_fail)
    yield served
    go_on.set()
    wait_for(lambda: not waiting(served), 60)


def waiting(served) -> int:
    return httpx.get(f"{served.url}gradio_api/queue/status").json()["queue_size"]


def join(served, cookie: str = "", address: str = "", **asked) -> httpx.Response:
    """Ask for a picture and go away."""
    headers = cookie_of(cookie) if cookie else {}
    headers |= {"X-Forwarded-For": address} if address else {}
    asked = {"prompt": "a dog", "steps": 1} | asked
    return httpx.post(f"{served.url}gradio_api/call/v2/generate", json=asked, headers=headers)


def taken(answers: list[httpx.Response]) -> int:
    for answer in answers:
        assert answer.is_success or (answer.status_code == 429 and "wait" in answer.json()["detail"])
    return sum(answer.is_success for answer in answers)


@pytest.mark.parametrize(
    ("cookie", "places", "other"),
    [
        ("eve", PER_VISITOR, ("ann", "")),
        ("", STRANGERS, ("", "203.0.113.7")),  # whoever forgets the cookie
        ("eve {}", STRANGERS, ("ann", "203.0.113.7")),
    ],
)
def test_a_visitor_and_an_address_wait_with_a_few_jobs_and_leave_room_for_others(busy, cookie, places, other):
    assert places <= taken([join(busy, cookie.format(n)) for n in range(places + 6)]) <= places + 1
    assert join(busy, *other).is_success and join(busy, cookie.format(places + 6)).status_code == 429


def test_stopping_and_listing_need_no_place(busy, monkeypatch):
    monkeypatch.setattr(public, "PLACES", 12)
    for number in range(18):
        join(busy, address=f"203.0.113.{number % 4}")
    assert "full" in join(busy, "ann", "203.0.113.9").json()["detail"]
    foreign_run(busy)
    client = Client(busy.url, verbose=False, headers=cookie_of("ann"))
    client.predict(api_name="/stop")
    assert "dog" in [row["name"] for row in client.predict(api_name="/adapters")]
    assert "you have no run" in refusal(client, "theirs", api_name="/stop_training").lower()


def test_the_queue_cannot_be_passed_by(served):
    url = f"{served.url}gradio_api"
    for direct in ("run", "api"):
        assert httpx.post(f"{url}/{direct}/inspect", json={"data": [None]}).status_code == 404
        assert httpx.post(f"{url}/{direct}/stop", json={"data": []}).status_code == 200


def test_visitors_take_turns_however_many_jobs_each_has_waiting():
    turns = Turns()
    eve, ann, bob = (asker(name, f"203.0.113.{n}") for n, name in enumerate(("eve", "ann", "bob")))
    waiting, drawn = [(eve, n) for n in range(4)] + [(ann, 0), (bob, 0), (ann, 1)], []
    while waiting:
        waiting = turns.in_order(waiting, [owner for owner, _ in waiting])
        drawn.append(waiting.pop(0))
        turns.note(drawn[-1][0])
        if len(drawn) == 3:
            waiting.append((bob, 1))
    assert [owner for owner, _ in drawn] == [eve, ann, bob, eve, ann, bob, eve, eve]
    assert [number for owner, number in drawn if owner is eve] == [0, 1, 2, 3]


def test_many_cookies_that_have_had_a_turn_each_are_together_no_more_than_a_few_visitors():
    """Eve keeps forty cookies, and asks again with each as soon as it was served; ann has one, at another address."""
    turns, drawn = Turns(), []
    eves, ann = [asker(f"eve {n}", "203.0.113.1") for n in range(40)], asker("ann", "203.0.113.2")
    login = asker("carl", "203.0.113.1", username="carl")
    for one in (*eves, ann, login):
        turns.note(one)
    waiting = [*eves, ann, login]
    for _ in range(120):
        waiting = turns.in_order(waiting, waiting)
        drawn.append(waiting.pop(0))
        turns.note(drawn[-1])
        waiting.append(drawn[-1])
    assert min(drawn.count(ann), drawn.count(login)) >= 120 // (TURNS_TOGETHER + 2) - 2
    assert len({visitor_id(one) for one in drawn}) == 42


@pytest.mark.slow
def test_a_visitor_who_comes_later_is_not_behind_all_jobs_of_another(served, monkeypatch):
    drawn, honest, gate = [], served.ctx.load_adapters, threading.Event()

    def noted(params, visitor):
        gate.wait(60)
        drawn.append(params.prompt)
        return honest(params, visitor)

    monkeypatch.setattr(served.ctx, "load_adapters", noted)
    ann, eve = (Client(served.url, verbose=False, headers=cookie_of(name)) for name in ("ann", "eve"))
    gate.set()
    for client in (ann, eve):
        client.predict("first", steps=1, api_name="/generate")
    gate.clear()
    jobs = [eve.submit(f"eve {n}", steps=1, api_name="/generate") for n in range(4)]
    wait_for(lambda: waiting(served) >= 3)
    jobs.append(ann.submit("ann", steps=1, api_name="/generate"))
    wait_for(lambda: waiting(served) >= 4)
    gate.set()
    for job in jobs:
        job.result(timeout=120)
    assert [prompt.partition(" ")[0] for prompt in drawn[2:]] == ["eve", "ann", "eve", "eve", "eve"]


@pytest.mark.slow
def test_made_up_cookies_leave_places_at_their_address_to_those_who_had_a_turn(served, request):
    ann = Client(served.url, verbose=False, headers=cookie_of("ann"))
    ann.predict("a dog", steps=1, api_name="/generate")
    busy = request.getfixturevalue("busy")
    assert STRANGERS <= taken([join(busy, f"made up {n}") for n in range(STRANGERS + 6)]) <= STRANGERS + 1
    assert join(busy, "ann").is_success


def test_a_picture_that_nobody_waits_for_is_not_drawn_to_its_end(served, client, monkeypatch):
    monkeypatch.setattr(public, "UNHEARD_SEC", 1.0)
    left = [join(served, steps=100, num_images=8, seed=seed).json()["event_id"] for seed in (4, 5)]
    pictures, *_ = client.predict(prompt="a cat", steps=40, num_images=3, api_name="/generate")  # longer, but heard
    assert len(pictures) == 3 and waiting(served) == 0
    for event in left:
        told = httpx.get(f"{served.url}gradio_api/call/generate/{event}", timeout=30).text
        assert "event: error" in told and "nobody fetched" in told


def test_anothers_session_is_neither_read_nor_cut_off_by_its_name(served):
    """It stands in addresses, and so in a proxy's log."""
    session, api = secrets.token_hex(8), f"{served.url}gradio_api"
    body = {"fn_index": event_of(served, "refresh", "click"), "data": [], "session_hash": session}
    joined = httpx.post(f"{api}/queue/join", json=body, headers=cookie_of("ann"))
    cancel = {"session_hash": session, "fn_index": 0, "event_id": joined.raise_for_status().json()["event_id"]}
    stream, cancelled = f"{api}/queue/data?session_hash={session}", {"success": True}
    for headers in (cookie_of("eve"), {}):
        assert httpx.get(stream, headers=headers).status_code == 403
        assert httpx.post(f"{api}/cancel", json=cancel, headers=headers).status_code == 403
    assert "process_completed" in httpx.get(stream, headers=cookie_of("ann"), timeout=20).text
    assert httpx.post(f"{api}/cancel", json=cancel, headers=cookie_of("ann")).json() == cancelled
    assert httpx.get(f"{api}/deep_link?session_hash={session}", headers=cookie_of("eve")).status_code == 403
    without_cookie = cancel | {"session_hash": secrets.token_hex(8)}  # as a client of the API has none
    assert httpx.post(f"{api}/cancel", json=without_cookie).json() == cancelled


def test_after_some_wrong_passwords_the_login_is_closed_for_that_address(tiny_base, tmp_path, monkeypatch):
    def login(password: str, address: str = "203.0.113.1") -> int:
        form = {"username": "ann", "password": password}
        return httpx.post(f"{server.url}login", data=form, headers={"X-Forwarded-For": address}).status_code

    tries = public.TRIES_PER_ADDRESS
    with serve(tiny_base, tmp_path, auth=[("ann", "secret")]) as server:
        assert [login("secret") for _ in range(tries + 2)] == [200] * (tries + 2)
        assert [login(f"wrong {n}") for n in range(tries + 2)] == [400] * tries + [429] * 2
        assert login("secret") == 429 and login("secret", "203.0.113.2") == 200
        monkeypatch.setattr(public, "TOGETHER", tries)
        assert login("secret", "203.0.113.2") == 429
        monkeypatch.setattr(public, "WINDOW_SEC", 0.0)
        assert login("secret") == 200


BUILT = """
import json, sys
from pathlib import Path
from gradio.queueing import Queue
from gradio.state_holder import SessionState
from dreambooth_moslora.ui.page import build_app, launch_options
from dreambooth_moslora.ui.state import AppContext, PageBase

base = PageBase("toy", "toy", 128, lambda: None)
folders = {name: Path(sys.argv[1]) / name for name in ("adapters_dir", "runs_dir")}
own = SessionState.__setitem__
for is_public, origins in ((False, ()), (True, {("https", "pictures.example.org", 443)})):
    ctx = AppContext(base, **folders, training=True, public=is_public)
    page = build_app(ctx, ["a photo of {}"])
    layers = launch_options(origins)["app_kwargs"]["middleware"]
    ctx.visitors.close()
    changed = sorted(name for name in vars(page._queue) if hasattr(Queue, name))
    changed += ["__setitem__"] * (SessionState.__setitem__ is not own)
    is_loaded = "dreambooth_moslora.ui.public" in sys.modules
    print(json.dumps([is_loaded, changed, [layer.cls.__name__ for layer in layers]]))
"""


@pytest.mark.slow
def test_what_guards_against_strangers_is_loaded_for_a_public_page_alone(tmp_path):
    """And Gradio's own parts stay as they are on a local one."""
    command = [sys.executable, "-c", BUILT, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == 0, done.stderr
    local, public = map(json.loads, done.stdout.splitlines()[-2:])
    assert local == [False, [], ["BodySizeLimit", "UploadQuota", "VisitorCookie"]]
    guards = ["BodySizeLimit", "UploadQuota", "LoginLimit", "SessionGuard", "UnknownNames", "VisitorCookie"]
    assert public == [True, ["get_events", "push", "send_message", "__setitem__"], guards]
