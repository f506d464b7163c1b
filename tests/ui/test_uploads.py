"""An upload fills neither the memory nor the disk, however long it is and however it ends."""

import contextlib
import http.client
import time
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import psutil
import pytest

from dreambooth_moslora.ui import guard as body_limit
from tests.helpers.ui_server import serve

MIB = 2**20
FIELD, FILE = 'form-data; name="files"', 'form-data; name="files"; filename="a.png"'
NOTE = 'form-data; name="note"'
DISGUISED = f'{NOTE}\r\nContent-Type: image/png; filename="a.png"'
KIND = {"Content-Type": "multipart/form-data; boundary=edge"}


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Where the page keeps uploads."""
    return tmp_path_factory.mktemp("uploads")


@pytest.fixture(scope="module")
def served(tiny_base, tmp_path_factory, stored):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(stored))
        with serve(tiny_base, tmp_path_factory.mktemp("app")) as server:
            yield server


def part(disposition: str, mib: int):
    yield f"--edge\r\nContent-Disposition: {disposition}\r\n\r\n".encode()
    for _ in range(mib):
        yield b"x" * MIB
    yield b"\r\n"


def sent(served, *parts) -> int:
    """The answer's status; 413 also when the server hangs up before it has read everything."""

    def content():
        for chunks in parts:
            yield from chunks
        yield b"--edge--\r\n"

    with contextlib.suppress(httpx.RemoteProtocolError, httpx.WriteError, httpx.ReadError):
        return httpx.post(f"{served.url}gradio_api/upload", content=content(), headers=KIND, timeout=120).status_code
    return 413


def files_in(folder: Path) -> list[Path]:
    return [file for file in folder.rglob("*") if file.is_file()]


@pytest.mark.parametrize("field", [NOTE, DISGUISED], ids=["plain", "disguised"])
@pytest.mark.parametrize("before", [0, 1], ids=["alone", "after a file"])
def test_a_field_that_is_no_file_is_not_taken_into_memory(served, stored, before, field):
    kept, memory = files_in(stored), psutil.Process().memory_info()
    assert sent(served, *[part(FILE, 1)] * before, part(field, 400)) == 413
    assert psutil.Process().memory_info().rss - memory.rss < 60 * MIB
    assert files_in(stored) == kept


def test_many_small_fields_count_together(served):
    assert sent(served, *(part(NOTE, 1) for _ in range(6))) == 413


def test_files_that_are_too_long_in_all_leave_nothing_on_the_disk(served, stored, monkeypatch):
    monkeypatch.setattr(body_limit, "MAX_UPLOAD_BYTES", 4 * MIB)
    kept = files_in(stored)
    assert sent(served, part(FILE, 3), part(FILE, 3), part(FILE, 3)) == 413
    assert files_in(stored) == kept


def test_an_upload_that_promises_too_much_is_refused_before_it_is_read(served):
    connection = http.client.HTTPConnection(urlsplit(served.url).netloc, timeout=20)
    promised = body_limit.MAX_UPLOAD_BYTES + body_limit.MAX_BODY_BYTES + 1
    connection.request("POST", "/gradio_api/upload", b"", KIND | {"Content-Length": str(promised)})
    assert connection.getresponse().status == 413


def test_an_upload_whose_sender_leaves_is_not_kept(served, stored):
    kept = files_in(stored)
    connection = http.client.HTTPConnection(urlsplit(served.url).netloc, timeout=20)
    connection.putrequest("POST", "/gradio_api/upload")
    for name, value in (KIND | {"Content-Length": str(8 * MIB)}).items():
        connection.putheader(name, value)
    connection.endheaders()
    connection.send(b"".join(part(FILE, 4)))
    deadline = time.monotonic() + 20
    while files_in(stored) == kept:
        assert time.monotonic() < deadline, "nothing is written"
        time.sleep(0.01)
    connection.close()
    while files_in(stored) != kept and time.monotonic() < deadline:
        time.sleep(0.01)
    assert files_in(stored) == kept


def test_files_are_taken_together_and_an_edge_inside_one_is_part_of_it(served):
    inside = b"--edg\r\nContent-Disposition: form-data\r\n\r\n" * 1000
    files = [("files", ("a.png", inside)), ("files", ("b.png", b"x" * 6 * MIB))]
    answer = httpx.post(f"{served.url}gradio_api/upload", files=files)
    assert [Path(path).read_bytes() for path in answer.json()] == [inside, b"x" * 6 * MIB]


def test_a_text_in_the_place_of_a_file_is_refused_and_leaves_nothing(served, stored):
    kept = files_in(stored)
    assert sent(served, part(FILE, 1), part(FIELD, 1)) == 400
    assert files_in(stored) == kept
