"""The queue is shared: nobody fills it alone, and what stops or lists something needs no place in it."""

import threading
import time
from types import SimpleNamespace

import httpx
import pytest
from gradio_client import Client

from dreambooth_moslora.ui.public import PER_VISITOR, STRANGERS, TURNS_TOGETHER, Turns
from dreambooth_moslora.ui.visitors import COOKIE, visitor_id
from tests.helpers.ui_server import cookie_of, secret_of
from tests.ui.test_private_events import foreign_run
from tests.ui.test_security import refusal


@pytest.fixture
def busy(served, monkeypatch):
    """Nothing that computes comes to an end until the test does."""
    go_on, drawn = threading.Event(), served.ctx.pipeline()
    monkeypatch.setattr(served.ctx, "pipeline", lambda: go_on.wait(60) and drawn)
    yield served
    go_on.set()
    deadline = time.monotonic() + 60
    while waiting(served) and time.monotonic() < deadline:
        time.sleep(0.05)


def waiting(served) -> int:
    return httpx.get(f"{served.url}gradio_api/queue/status").json()["queue_size"]


def join(served, cookie: str = "", address: str = "") -> httpx.Response:
    """Ask for a picture and go away."""
    headers = cookie_of(cookie) if cookie else {}
    headers |= {"X-Forwarded-For": address} if address else {}
    asked = {"prompt": "a dog", "steps": 1}
    return httpx.post(f"{served.url}gradio_api/call/v2/generate", json=asked, headers=headers)


def taken(answers: list[httpx.Response]) -> int:
    for answer in answers:
        assert answer.is_success or (answer.status_code == 429 and "wait" in answer.json()["detail"])
    return sum(answer.is_success for answer in answers)


def test_one_visitor_waits_with_a_few_jobs_and_leaves_room_for_the_others(busy):
    assert PER_VISITOR <= taken([join(busy, "eve") for _ in range(70)]) <= PER_VISITOR + 1
    assert join(busy, "ann").is_success
    assert join(busy, "eve").status_code == 429


def test_whoever_forgets_the_cookie_shares_the_places_of_an_address(busy):
    assert STRANGERS <= taken([join(busy) for _ in range(70)]) <= STRANGERS + 1
    assert join(busy, address="203.0.113.7").is_success


def test_many_cookies_at_one_address_leave_room_for_another_address(busy):
    assert STRANGERS <= taken([join(busy, f"eve{n}") for n in range(70)]) <= STRANGERS + 1
    assert join(busy, "ann", address="203.0.113.7").is_success


def test_stopping_and_listing_need_no_place(busy):
    for address in range(4):
        for _ in range(30):
            join(busy, address=f"203.0.113.{address}")
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
    eve, ann, bob = (visitor(name, f"203.0.113.{n}") for n, name in enumerate(("eve", "ann", "bob")))
    waiting, drawn = [(eve, n) for n in range(4)] + [(ann, 0), (bob, 0), (ann, 1)], []
    while waiting:
        waiting = turns.in_order(waiting, [asker for asker, _ in waiting])
        drawn.append(waiting.pop(0))
        turns.note(drawn[-1][0])
        if len(drawn) == 3:
            waiting.append((bob, 1))
    assert [owner for owner, _ in drawn] == [eve, ann, bob, eve, ann, bob, eve, eve]
    assert [number for owner, number in drawn if owner is eve] == [0, 1, 2, 3]


def test_many_cookies_that_have_had_a_turn_each_are_together_no_more_than_a_few_visitors():
    """Eve keeps forty cookies, and asks again with each as soon as it was served; ann has one, at another address."""
    turns, drawn = Turns(), []
    eves, ann = [visitor(f"eve {n}", "203.0.113.1") for n in range(40)], visitor("ann", "203.0.113.2")
    login = visitor("carl", "203.0.113.1", username="carl")
    for asker in (*eves, ann, login):
        turns.note(asker)
    waiting = [*eves, ann, login]
    for _ in range(120):
        waiting = turns.in_order(waiting, waiting)
        drawn.append(waiting.pop(0))
        turns.note(drawn[-1])
        waiting.append(drawn[-1])
    assert min(drawn.count(ann), drawn.count(login)) >= 120 // (TURNS_TOGETHER + 2) - 2
    assert len({visitor_id(asker) for asker in drawn}) == 42


def visitor(name: str, address: str, username: str | None = None) -> SimpleNamespace:
    client = SimpleNamespace(host=address)
    return SimpleNamespace(cookies={COOKIE: secret_of(name)}, session_hash=None, username=username, client=client)


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
    while waiting(served) < 3:
        time.sleep(0.02)
    jobs.append(ann.submit("ann", steps=1, api_name="/generate"))
    while waiting(served) < 4:
        time.sleep(0.02)
    gate.set()
    for job in jobs:
        job.result(timeout=120)
    assert [prompt.partition(" ")[0] for prompt in drawn[2:]] == ["eve", "ann", "eve", "eve", "eve"]


@pytest.mark.slow
def test_made_up_cookies_leave_places_at_their_address_to_those_who_had_a_turn(served, monkeypatch):
    ann = Client(served.url, verbose=False, headers=cookie_of("ann"))
    ann.predict("a dog", steps=1, api_name="/generate")
    go_on, drawn = threading.Event(), served.ctx.pipeline()
    monkeypatch.setattr(served.ctx, "pipeline", lambda: go_on.wait(60) and drawn)
    try:
        assert STRANGERS <= taken([join(served, f"made up {n}") for n in range(70)]) <= STRANGERS + 1
        assert join(served, "ann").is_success
    finally:
        go_on.set()
