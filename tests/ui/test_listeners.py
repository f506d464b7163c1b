"""Work that nobody listens to ends, and whoever listens gets it all."""

import time

import httpx
import pytest
from gradio_client import Client

from dreambooth_moslora.ui import public as queue_limits
from tests.ui.test_queue import waiting

LONG = {"prompt": "a dog", "steps": 100, "num_images": 8}


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(queue_limits, "UNHEARD_SEC", 1.0)


def asked(served, name: str = "generate", **more) -> str:
    return httpx.post(f"{served.url}gradio_api/call/v2/{name}", json=LONG | more).json()["event_id"]


def test_a_picture_that_nobody_waits_for_is_not_drawn_to_its_end(served, client):
    asked(served)
    asked(served, seed=5)
    started = time.monotonic()
    client.predict(prompt="a cat", steps=1, api_name="/generate")
    assert time.monotonic() - started < 30 and waiting(served) == 0


def test_whoever_asks_later_is_told_that_the_work_was_left(served):
    event = asked(served)
    time.sleep(4)
    told = httpx.get(f"{served.url}gradio_api/call/generate/{event}", timeout=30).text
    assert "event: error" in told and "nobody fetched" in told


def test_whoever_listens_gets_all_however_long_it_takes(served):
    client = Client(served.url, verbose=False)
    pictures, *_ = client.predict(prompt="a dog", steps=40, num_images=3, api_name="/generate")
    assert len(pictures) == 3
