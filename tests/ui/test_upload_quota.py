"""What a visitor may leave on the disk, and that nothing is left of it when the page has ended."""

import os
import secrets
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from dreambooth_moslora.ui import guard as upload_quota
from tests.helpers.ui_server import cookie_of, serve

MIB = 2**20


@pytest.fixture(scope="module")
def served(tiny_base, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("uploads")))
        with serve(tiny_base, tmp_path_factory.mktemp("app")) as server:
            yield server


def sent(served, visitor: str, content: bytes = b"") -> Path:
    """A file of one MiB, of its own content if none is given."""
    files = {"files": ("a.png", content or secrets.token_bytes(MIB))}
    answer = httpx.post(f"{served.url}gradio_api/upload", files=files, headers=cookie_of(visitor))
    return Path(answer.raise_for_status().json()[0])


def wait_until_gone(path: Path) -> None:
    deadline = time.monotonic() + 20
    while path.exists() and time.monotonic() < deadline:
        time.sleep(0.02)


def test_a_visitors_oldest_uploads_make_room_for_the_new_ones(served, monkeypatch):
    monkeypatch.setattr(upload_quota, "MAX_BYTES_EACH", 3 * MIB)
    others = sent(served, "bob")
    mine = [sent(served, "eve") for _ in range(5)]
    wait_until_gone(mine[1])  # it is noted after the answer
    assert [path.is_file() for path in mine] == [False, False, True, True, True]
    assert others.is_file()


def test_a_file_that_two_visitors_sent_stays_for_the_other(served, monkeypatch):
    monkeypatch.setattr(upload_quota, "MAX_BYTES_EACH", 1 * MIB)
    content = secrets.token_bytes(MIB)
    shared = sent(served, "ann", content)
    assert sent(served, "cleo", content) == shared
    own, again = sent(served, "cleo"), sent(served, "cleo")
    wait_until_gone(own)
    assert shared.is_file() and again.is_file() and not own.exists()


def test_the_newest_upload_always_stays(served, monkeypatch):
    monkeypatch.setattr(upload_quota, "MAX_BYTES_EACH", MIB // 2)
    assert sent(served, "dan").is_file()


def test_an_upload_that_would_fill_the_disk_is_refused(served, monkeypatch):
    monkeypatch.setattr(upload_quota, "DISK_RESERVE_BYTES", 2**60)
    answer = httpx.post(f"{served.url}gradio_api/upload", files={"files": ("a.png", b"x" * MIB)})
    assert answer.status_code == 507 and "disk" in answer.text


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_nothing_that_a_visitor_sent_outlives_the_server(tmp_path, free_port, number):
    """After a kill the next start clears it away."""
    environment = os.environ | {"TMPDIR": str(tmp_path / "tmp")}
    environment.pop("GRADIO_TEMP_DIR", None)
    (tmp_path / "tmp").mkdir()
    command = [sys.executable, "app.py", "--runs_dir", str(tmp_path / "runs"), "--server_port", str(free_port)]
    page = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        uploaded = upload_when_up(f"http://127.0.0.1:{free_port}/gradio_api/upload")
        assert uploaded.is_relative_to(tmp_path / "tmp")
    finally:
        page.send_signal(number)
        page.wait(timeout=60)
    if number == signal.SIGKILL:
        assert uploaded.is_file()
        code = "from dreambooth_moslora.ui.visitors import Visitors; Visitors().close()"
        subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    assert not [path for path in (tmp_path / "tmp").rglob("*") if path.is_file()]


def upload_when_up(url: str) -> Path:
    deadline = time.monotonic() + 120
    while True:
        try:
            return Path(httpx.post(url, files={"files": ("gps.jpg", b"x" * 100)}, timeout=30).json()[0])
        except httpx.TransportError:
            assert time.monotonic() < deadline
            time.sleep(0.2)
