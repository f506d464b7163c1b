"""Each visitor stays who they are, keeps what is theirs, and nobody reaches the page through another site."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest

from dreambooth_moslora.core import UserError
from dreambooth_moslora.ui.guard import MAX_BODY_BYTES, origins_of
from dreambooth_moslora.ui.visitors import COOKIE, KEPT_SEC, LONGEST_KEPT_SEC, MAX_VISITORS, Visitors, visitor_id
from tests.helpers.ui_server import secret_of

ROOT = Path(__file__).parents[2]


def test_the_cookie_is_unreadable_for_scripts_and_not_sent_across_sites(served):
    answer = httpx.get(served.url)
    cookie = next(value for value in answer.headers.get_list("set-cookie") if value.startswith("moslora_visitor="))
    assert "HttpOnly" in cookie and "SameSite=Lax" in cookie


@pytest.mark.parametrize("others", ["", "a/b=c; ", "bad cookie=1; ", "novalue; ", 'x={"a": 1}; '])
def test_a_visitor_stays_the_same_whatever_other_cookies_the_host_has(served, others):
    answer = httpx.get(served.url, headers={"Cookie": f"{others}{COOKIE}={secret_of('x')}"})
    assert answer.status_code == 200 and not answer.headers.get_list("set-cookie")


@pytest.mark.parametrize("weak", ["", "a-long-secret-of-mine", "0" * 64, "ab" * 20])
def test_a_cookie_that_others_may_guess_counts_as_none(served, weak):
    answer = httpx.get(served.url, headers={"Cookie": f"{COOKIE}={weak}"})
    assert COOKIE in answer.headers["set-cookie"]
    one, other = (SimpleNamespace(cookies={COOKIE: weak}, session_hash=name) for name in "ab")
    assert visitor_id(one) != visitor_id(other)
    assert visitor_id(asker("x")) == visitor_id(asker("x"))


def asker(secret: str) -> SimpleNamespace:
    return SimpleNamespace(cookies={COOKIE: secret_of(secret)}, session_hash=None)


def test_strangers_do_not_push_out_a_visitor_who_has_stored_something():
    visitors = Visitors()
    try:
        ann = visitors.of(asker("ann"))
        picture = ann.folder / "picture.png"
        picture.write_bytes(b"x")
        for number in range(3 * MAX_VISITORS):
            visitors.of(asker(f"stranger {number}"))
        assert visitors.of(asker("ann")) is ann and picture.exists()
        assert len(list(visitors.root.iterdir())) == 1
    finally:
        visitors.close()


def test_old_visitors_go_with_their_files(monkeypatch):
    visitors = Visitors()
    try:
        ann = visitors.of(asker("ann"))
        folder = ann.folder
        ann.seen_at -= KEPT_SEC + 1
        for number in range(MAX_VISITORS):
            visitors.of(asker(f"stranger {number}"))
        assert not folder.exists() and visitors.of(asker("ann")) is not ann
    finally:
        visitors.close()


def test_whoever_has_not_come_for_a_week_goes_with_all_files():
    visitors = Visitors()
    try:
        ann, bob = visitors.of(asker("ann")), visitors.of(asker("bob"))
        folders = [ann.folder, bob.folder]
        ann.seen_at -= LONGEST_KEPT_SEC + 1
        bob.seen_at -= LONGEST_KEPT_SEC - 60
        assert visitors.of(asker("bob")) is bob and [folder.exists() for folder in folders] == [False, True]
        assert visitors.of(asker("ann")) is not ann
    finally:
        visitors.close()


def test_a_page_on_the_loopback_answers_only_to_its_own_names(served):
    url, foreign = served.url, {"Origin": "http://evil.example"}
    assert httpx.get(url).status_code == 200
    assert httpx.get(url, headers={"Host": "evil.example:80"}).status_code == 421
    sent = {"files": ("a.png", b"x")}
    assert httpx.post(f"{url}gradio_api/upload", files=sent, headers=foreign).status_code == 403
    own = {"Origin": url.rstrip("/")}
    assert httpx.post(f"{url}gradio_api/upload", files=sent, headers=own).status_code == 200


ADDRESSES = {
    "Pictures.Example.org": {("http", 80), ("https", 443)},
    "pictures.example.org:8443": {("http", 8443), ("https", 8443)},
    "https://pictures.example.org/": {("https", 443)},
    "https://pictures.example.org:8443": {("https", 8443)},
}


@pytest.mark.parametrize("text", ADDRESSES)
def test_an_allowed_host_may_be_written_as_an_address(text):
    assert origins_of(text) == {(scheme, "pictures.example.org", port) for scheme, port in ADDRESSES[text]}


@pytest.mark.parametrize("text", ["https://", "", "ftp://pictures.example.org", "pictures.example.org:port"])
def test_what_is_no_host_is_refused(text):
    with pytest.raises(UserError, match="is not a host name"):
        origins_of(text)


@pytest.mark.parametrize("path", ["queue/join", "run/stop", "call/stop", "run/upload"])
def test_a_body_longer_than_any_form_is_not_taken_into_memory(served, path):
    def parts():
        """Sent in chunks, which promise no length."""
        yield b'{"data": ["'
        for _ in range(MAX_BODY_BYTES // 2**20 + 1):
            yield b"x" * 2**20
        yield b'"], "session_hash": "a", "fn_index": 0}'

    url, headers = f"{served.url}gradio_api/{path}", {"Content-Type": "application/json"}
    assert httpx.post(url, content=b"".join(parts()), headers=headers).status_code == 413
    with contextlib.suppress(httpx.RemoteProtocolError, httpx.WriteError):
        assert httpx.post(url, content=parts(), headers=headers).status_code >= 400
    assert httpx.post(f"{served.url}gradio_api/run/stop", json={"data": []}).status_code == 200


def test_an_upload_may_be_longer_than_a_form(served):
    files = {"files": ("a.png", b"x" * (MAX_BODY_BYTES + 1))}
    assert httpx.post(f"{served.url}gradio_api/upload", files=files).status_code == 200


def test_nobody_reads_what_others_ask_for_from_the_monitor(served):
    assert httpx.get(f"{served.url}monitoring/summary").status_code in (403, 404)
    assert httpx.get(f"{served.url}monitoring").status_code in (403, 404)


def test_a_page_that_is_terminated_leaves_no_visitors_files(tmp_path, free_port):
    command = [sys.executable, "app.py", "--runs_dir", str(tmp_path / "runs"), "--server_port", str(free_port)]
    environment = os.environ | {"TMPDIR": str(tmp_path), "PYTHONUNBUFFERED": "1"}
    (tmp_path / "moslora-app-999999999-left").mkdir()
    app = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert any("Running on" in line for line in app.stdout)
        assert len(list(tmp_path.glob("moslora-app-*"))) == 1
        app.terminate()
        assert app.wait(30) == 143
    finally:
        app.kill()
    assert not list(tmp_path.glob("moslora-app-*"))
