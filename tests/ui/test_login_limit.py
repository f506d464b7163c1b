"""Wrong passwords are counted; the right one is not, and other addresses go on."""

import httpx
import pytest

from dreambooth_moslora.ui import public as login_limit
from dreambooth_moslora.ui.public import TRIES_PER_ADDRESS
from tests.helpers.ui_server import serve


@pytest.fixture
def url(tiny_base, tmp_path):
    with serve(tiny_base, tmp_path, auth=[("ann", "secret")]) as server:
        yield server.url


def login(url: str, password: str, address: str = "203.0.113.1") -> int:
    form = {"username": "ann", "password": password}
    return httpx.post(f"{url}login", data=form, headers={"X-Forwarded-For": address}).status_code


def test_after_some_wrong_passwords_the_login_is_closed_for_that_address(url, monkeypatch):
    assert [login(url, "secret") for _ in range(TRIES_PER_ADDRESS + 2)] == [200] * (TRIES_PER_ADDRESS + 2)
    assert [login(url, f"wrong {n}") for n in range(TRIES_PER_ADDRESS + 2)] == [400] * TRIES_PER_ADDRESS + [429] * 2
    assert login(url, "secret") == 429 and login(url, "secret", "203.0.113.2") == 200
    monkeypatch.setattr(login_limit, "TOGETHER", TRIES_PER_ADDRESS)
    assert login(url, "secret", "203.0.113.2") == 429
    monkeypatch.setattr(login_limit, "WINDOW_SEC", 0.0)
    assert login(url, "secret") == 200
