"""A page for everybody only draws: nothing else is there, shown or hidden, and it takes neither
files nor addresses."""

import json
import shutil
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import httpx
import pytest
from gradio.route_utils import BUILD_PATH_LIB

from dreambooth_moslora.errors import UserError
from dreambooth_moslora.generation.image_params import MAX_PROMPT_CHARACTERS
from dreambooth_moslora.ui.guard import MAX_FILES, MAX_FORM_BYTES, SessionMessages, refuse_long_body
from dreambooth_moslora.ui.page import MAX_WAITING, build_launch_options
from dreambooth_moslora.ui.state import MAX_STOPS
from tests.helpers.ui_server import serve
from tests.ui.conftest import refusal, wait_for

DRAW = {"steps": 1, "api_name": "/generate"}
EVERYTHING = {"generate", "compare", "stop", "adapters"}
NOT_THERE = ("train", "submit", "stop_training", "look", "inspect")
FILES = {"file", "uploadbutton", "imageeditor", "downloadbutton", "timer"}


@pytest.fixture(scope="module")
def served(tiny_base, tmp_path_factory):
    """With a run beside the adapters of the shelf."""
    with serve(tiny_base, tmp_path_factory.mktemp("public"), public=True) as server:
        (run := server.ctx.runs_dir / "mine").mkdir()
        shutil.copy(server.ctx.catalog.find_file("dog"), run / "pytorch_lora_weights.safetensors")
        yield server


def test_there_is_no_widget_event_or_endpoint_but_for_pictures(served):
    config = httpx.get(f"{served.url}config").json()
    kinds = {component["type"] for component in config["components"]}
    assert "gallery" in kinds and not kinds & FILES
    tabs = [c["props"]["label"] for c in config["components"] if c["type"] == "tabitem"]
    assert tabs == ["Generate", "Pictures", "Compare"]
    public = {d["api_name"] for d in config["dependencies"] if d["api_visibility"] == "public"}
    told = httpx.get(f"{served.url}gradio_api/info").json()["named_endpoints"]
    assert public == {name.strip("/") for name in told} == EVERYTHING


@pytest.mark.parametrize("name", NOT_THERE)
def test_what_only_the_owner_does_cannot_be_called(served, name):
    for way in ("call", "call/v2", "run", "api"):
        answer = httpx.post(f"{served.url}gradio_api/{way}/{name}", json={"data": []})
        if answer.is_success:
            event = answer.json()["event_id"]
            answer = httpx.get(f"{served.url}gradio_api/call/{name}/{event}", timeout=60)
            assert "event: error" in answer.text and "complete" not in answer.text
        else:
            assert answer.status_code >= 400


def test_it_draws_with_the_adapters_of_the_shelf_alone_and_compares(served, client):
    assert [row["name"] for row in client.predict(api_name="/adapters")] == ["cat", "dog"]
    gallery, seed, status = client.predict("a sks dog", adapter="dog", seed=3, **DRAW)
    assert len(gallery) == 1 and seed == 3 and "1 picture in" in status
    pair, _ = client.predict("a sks dog", adapter="dog", steps=1, api_name="/compare")
    assert len(pair) == 2
    assert "no adapter mine" in refusal(client, "a dog", adapter="mine", **DRAW)
    for asked, words in (
        ({"num_images": 9}, "maximum value 8"),
        ({"steps": 101}, "maximum value 100"),
        ({"size": "1024 x 1024"}, "at most 128 x 128 px"),
    ):
        assert words in refusal(client, "a dog", **DRAW | asked)


def test_no_file_is_taken_and_no_body_longer_than_a_form(served):
    api = f"{served.url}gradio_api"
    for path in ("upload", "upload/", "run/upload", "component_server", "process_recording"):
        answer = httpx.post(f"{api}/{path}", files={"files": ("a.png", b"x")})
        assert answer.status_code == 404 and answer.text == "this page takes no files", path
    for path in ("upload_progress?upload_id=x", "deep_link?session_hash=x"):
        assert httpx.get(f"{api}/{path}").status_code == 404
    stop, kind = f"{api}/run/stop", {"Content-Type": "application/json"}
    body = json.dumps({"data": [], "x": "x" * MAX_FORM_BYTES}).encode()
    for content in (body, iter([body])):  # in chunks, which promise no length
        assert httpx.post(stop, content=content, headers=kind).status_code == 413
    # One of gradio's two HTTP parsers takes a body in chunks beside a length, and reads all of it.
    both = [(b"content-length", b"2"), (b"transfer-encoding", b"chunked")]
    assert refuse_long_body({"method": "POST", "headers": both}).status_code == 413
    assert httpx.post(stop, json={"data": []}).status_code == 200


def test_a_form_holds_the_longest_texts_and_little_more():
    """What waits for the rest of a form stays in memory, for each of 65,536 connections."""
    texts = ["\N{DOG FACE}" * MAX_PROMPT_CHARACTERS] * 2
    assert len(json.dumps({"data": texts}, ensure_ascii=False).encode()) < MAX_FORM_BYTES
    assert 2**16 * MAX_FORM_BYTES <= 4 * 2**30


def test_a_picture_that_is_none_of_the_pages_is_not_opened(served, tmp_path):
    """Without `meta` gradio does not look where a file lies."""
    events = httpx.get(f"{served.url}config").json()["dependencies"]
    reuse = next(event["id"] for event in events if event["api_name"] == "restore_recipe")
    for file in (tmp_path / "owner.png", Path("/proc/self/fd/0"), tmp_path / "none.png"):
        item = {"image": {"path": str(file)}, "caption": None}
        asked = {"fn_index": reuse, "session_hash": file.stem, "data": [[item], 0]}
        httpx.post(f"{served.url}gradio_api/queue/join", json=asked)
        with httpx.stream(
            "GET", f"{served.url}gradio_api/queue/data?session_hash={file.stem}", timeout=60
        ) as answer:
            said = next(line for line in answer.iter_lines() if "process_completed" in line)
        assert "not one of this page" in said and '"success":false' in said.replace(" ", "")


def test_sessions_that_never_draw_are_forgotten(served):
    for number in range(MAX_STOPS + 5):
        request = SimpleNamespace(session_hash=f"{number}" + "x" * 10_000)
        served.ctx.register_work(request)
    names = list(served.ctx._stops)
    assert len(names) == MAX_STOPS and max(map(len, names)) <= 32


def event_numbers(served) -> dict[str, int]:
    """Name of an event -> its number."""
    config = httpx.get(f"{served.url}config").json()
    return {one["api_name"]: one["id"] for one in config["dependencies"]}


def last_of(served, session: str) -> str:
    """The last message of an event, as the session's stream tells it."""
    stream = f"{served.url}gradio_api/queue/data?session_hash={session}"
    with httpx.stream("GET", stream, timeout=60) as answer:
        return next(line for line in answer.iter_lines() if "process_completed" in line)


def joined(served, session: str, **given) -> httpx.Response:
    """The answer to one picture that a session asks for."""
    info = httpx.get(f"{served.url}gradio_api/info").json()["named_endpoints"]["/generate"]
    names = [one["parameter_name"] for one in info["parameters"]]
    defaults = [one.get("parameter_default") for one in info["parameters"]]
    data = list((dict(zip(names, defaults, strict=True)) | given).values())
    number = event_numbers(served)["generate"]
    asked = {"fn_index": number, "data": data, "session_hash": session}
    return httpx.post(f"{served.url}gradio_api/queue/join", json=asked)


def test_no_session_stops_the_queue_without_a_name_or_when_it_is_forgotten(served, client):
    for session in ("", "a" * 65):
        answer = joined(served, session)
        assert not answer.is_success and "1 to 64 characters" in answer.text
    assert joined(served, "first").is_success and joined(served, "second").is_success
    served.page._queue.pending_messages_per_session.pop("second", None)
    gallery, *_ = client.predict("a sks dog", adapter="dog", seed=3, **DRAW)
    assert len(gallery) == 1


def test_a_forgotten_session_leaves_nothing_behind(served, client):
    """Its events' names stayed, and a task for each of its streams that were dropped."""
    queue = served.page._queue
    assert joined(served, "third").is_success
    for _ in range(2):
        del queue.pending_messages_per_session["third"]
    client.predict("a sks dog", adapter="dog", seed=3, **DRAW)
    assert queue.pending_event_ids_session.keys() <= queue.pending_messages_per_session.keys()
    # The oldest goes when there are too many.
    places = SessionMessages(2)
    for name in "abc":
        places[name] = None
    assert list(places) == ["b", "c"]


@pytest.mark.slow
def test_what_nobody_reads_is_not_kept_for_good(served, client, monkeypatch):
    """Every preview of a session that asked for pictures and never listened stayed in memory."""
    monkeypatch.setattr("dreambooth_moslora.ui.guard.MAX_UNREAD_MESSAGES", 12)
    assert all(joined(served, "deaf", prompt="a dog", steps=1).is_success for _ in range(4))
    gallery, *_ = client.predict("a sks dog", adapter="dog", seed=3, **DRAW)
    assert len(gallery) == 1
    places = served.page._queue.pending_messages_per_session
    assert "deaf" not in places and sum(one.qsize() for one in places.values()) <= 12


def test_nobody_cancels_what_is_drawn_by_gradios_own_way(served):
    """Cancelled twice, it stayed in memory with its form, and another base drew nothing more."""
    event = joined(served, "quitter").json()["event_id"]
    config = httpx.get(f"{served.url}config").json()
    named = {one["api_name"]: one["id"] for one in config["dependencies"]}
    asked = {"session_hash": "quitter", "fn_index": named["generate"], "event_id": event}
    for path in ("cancel", "cancel/"):
        answer = httpx.post(f"{served.url}gradio_api/{path}", json=asked)
        assert answer.status_code == 404 and answer.text == "not of this page"


@pytest.mark.parametrize("path", ["upload", "process_recording", "component_server"])
def test_no_path_is_found_with_a_lines_end_behind_it(served, path):
    """Starlette takes it for the path without, so that a file was kept of whoever sent one."""
    answer = httpx.post(f"{served.url}gradio_api/{path}%0A", files={"files": ("a.png", b"x")})
    assert answer.status_code == 404 and answer.text == "not of this page"


def test_nobody_waits_for_changes_of_the_program(served):
    """A thousand who did kept the page from answering anybody else."""
    with httpx.stream("GET", f"{served.url}gradio_api/dev/reload", timeout=10) as answer:
        assert answer.status_code == 404


def test_what_a_picture_was_asked_is_not_changed_while_it_is_drawn(served):
    event = joined(served, "swapper").json()["event_id"]
    given = {"data": [], "session_hash": "swapper"}
    answer = httpx.post(f"{served.url}gradio_api/stream/{event}", json=given)
    assert answer.status_code == 404 and answer.text == "not of this page"


def test_no_request_writes_an_address_into_what_others_get(tiny_base, tmp_path):
    """Not on a page that answers to every name, either."""
    options = build_launch_options(any_host=True, public=True) | {"server_name": "127.0.0.2"}
    with serve(tiny_base, tmp_path, public=True, **options) as server:
        for path in ("info", "info/", "info?page=x"):
            told = f"{server.url}gradio_api/{path}"
            for headers in ({"X-Gradio-Server": "http://evil.example"}, {"Host": "evil.example"}):
                assert httpx.get(told, headers=headers).is_success
                answer = httpx.get(told)
                assert "generate" in answer.text and "evil.example" not in answer.text
        # Not to whoever asks at the same time, either: gradio keeps none.
        assert not server.page.app.api_info


def test_a_header_without_an_end_is_not_read_to_its_end(served):
    parts = urlsplit(served.url)
    with socket.create_connection((parts.hostname, parts.port), timeout=60) as connection:
        connection.sendall(f"GET / HTTP/1.1\r\nHost: {parts.netloc}\r\nX-A: ".encode())
        with suppress(ConnectionError):  # the server has gone
            for _ in range(64):
                connection.sendall(b"a" * 2**16)
        with suppress(ConnectionError):
            assert b" 200 " not in connection.recv(2**16)


@pytest.mark.slow
def test_a_connection_ends_that_takes_nothing_of_what_it_asked_for(served, monkeypatch):
    """Each kept 200 KB of a file in memory, for as long as it liked."""
    monkeypatch.setattr("dreambooth_moslora.ui.guard.STALL_SEC", 1)
    largest = max(Path(BUILD_PATH_LIB).glob("*.js"), key=lambda file: file.stat().st_size)
    parts = urlsplit(served.url)
    asked = f"GET /assets/{largest.name} HTTP/1.1\r\nHost: {parts.netloc}\r\n\r\n"
    expected = 4 * largest.stat().st_size
    for pause, is_whole in ((0, True), (3, False)):
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.settimeout(60)
            connection.connect((parts.hostname, parts.port))
            connection.sendall(4 * asked.encode())
            time.sleep(pause)
            received = 0
            with suppress(ConnectionError):
                while received < expected and (some := connection.recv(2**16)):
                    received += len(some)
        assert (received >= expected) == is_whole


def test_a_stream_is_not_compressed_by_its_name(served):
    """Gradio took it for a script, and kept 250 KB for each connection."""
    asked = f"{served.url}gradio_api/heartbeat/x.js"
    with httpx.stream("GET", asked, headers={"Accept-Encoding": "br"}) as answer:
        assert answer.is_success and "content-encoding" not in answer.headers
    page = httpx.get(f"{served.url}theme.css", headers={"Accept-Encoding": "br"})
    assert page.headers["content-encoding"] == "br"


def test_an_address_in_place_of_a_text_is_not_fetched(served, monkeypatch):
    """Gradio would keep the file for a day, however long it is."""
    fetched = []

    async def fetch(url, *_, **options):
        fetched.append(url)
        raise OSError

    monkeypatch.setattr("gradio.processing_utils.async_ssrf_protected_download", fetch)
    evil = {"path": "https://evil.example/x.png", "meta": {"_type": "gradio.FileData"}}
    event = httpx.post(f"{served.url}gradio_api/call/v2/generate", json={"prompt": evil}).json()[
        "event_id"
    ]
    answer = httpx.get(f"{served.url}gradio_api/call/generate/{event}", timeout=60).text
    assert "event: error" in answer and "fetches no address" in answer and not fetched


def test_no_address_is_fetched_after_a_picture_either(served, monkeypatch):
    """By a frame that leaves the gallery as it is, gradio gives the session one of its own."""
    fetched = []

    async def fetch(url, *_, **options):
        fetched.append(url)
        raise OSError

    monkeypatch.setattr("gradio.processing_utils.async_ssrf_protected_download", fetch)
    monkeypatch.setattr(
        served.ctx, "get_loaded_pipeline", lambda: None
    )  # a frame without pictures, as previews
    assert joined(served, "painter", prompt="a dog", steps=1).is_success
    assert '"success":true' in last_of(served, "painter").replace(" ", "")
    evil = {"path": "https://evil.example/x.png", "meta": {"_type": "gradio.FileData"}}
    asked = {"data": [[{"image": evil, "caption": None}], 0], "session_hash": "painter"}
    asked["fn_index"] = event_numbers(served)["restore_recipe"]
    assert httpx.post(f"{served.url}gradio_api/queue/join", json=asked).is_success
    assert "fetches no address" in last_of(served, "painter") and not fetched


def test_a_form_names_a_few_files_alone(served):
    """A thousand of the page's own pictures kept it from answering anybody for seconds."""
    file = {"path": "a.png", "meta": {"_type": "gradio.FileData"}}
    describe, allowed = f"{served.url}gradio_api/run/describe", []
    for number in (MAX_FILES, MAX_FILES + 1):
        answer = httpx.post(describe, json={"data": ["dog", [file] * number]})
        allowed.append("too many files" not in answer.text)
    assert allowed == [True, False]


@pytest.mark.slow
def test_so_many_pictures_wait_and_the_next_is_told_that_the_queue_is_full(served, monkeypatch):
    go_on = threading.Event()

    def wait_and_fail():
        go_on.wait(60)
        raise UserError("the test is over")

    def waiting() -> int:
        return httpx.get(f"{served.url}gradio_api/queue/status").json()["queue_size"]

    def ask() -> httpx.Response:
        return httpx.post(
            f"{served.url}gradio_api/call/v2/generate", json={"prompt": "a dog", "steps": 1}
        )

    monkeypatch.setattr(served.ctx, "wait_for_pipeline", wait_and_fail)
    try:
        answers = [ask() for _ in range(MAX_WAITING + 3)]
        assert MAX_WAITING <= sum(answer.is_success for answer in answers) <= MAX_WAITING + 2
        assert answers[-1].status_code == 503 and "full" in answers[-1].text
        stop = f"{served.url}gradio_api/run/stop"  # as the page asks for it: it needs no place
        assert httpx.post(stop, json={"data": []}).status_code == 200
    finally:
        go_on.set()
        wait_for(lambda: not waiting(), 60)
