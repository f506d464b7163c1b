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
from tests.ui.conftest import get_refusal, wait_for

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


def test_public_page_has_only_generation(served):
    config = httpx.get(f"{served.url}config").json()
    kinds = {component["type"] for component in config["components"]}
    assert "gallery" in kinds and not kinds & FILES
    tabs = [c["props"]["label"] for c in config["components"] if c["type"] == "tabitem"]
    assert tabs == ["Generate", "Pictures", "Compare"]
    public = {d["api_name"] for d in config["dependencies"] if d["api_visibility"] == "public"}
    endpoints = httpx.get(f"{served.url}gradio_api/info").json()["named_endpoints"]
    assert public == {name.strip("/") for name in endpoints} == EVERYTHING


@pytest.mark.parametrize("name", NOT_THERE)
def test_owner_events_cannot_be_called(served, name):
    for path in ("call", "call/v2", "run", "api"):
        answer = httpx.post(f"{served.url}gradio_api/{path}/{name}", json={"data": []})
        if answer.is_success:
            event = answer.json()["event_id"]
            answer = httpx.get(f"{served.url}gradio_api/call/{name}/{event}", timeout=60)
            assert "event: error" in answer.text and "complete" not in answer.text
        else:
            assert answer.status_code >= 400


def test_public_page_generates_with_listed_adapters_only(served, client):
    assert [row["name"] for row in client.predict(api_name="/adapters")] == ["cat", "dog"]
    gallery, seed, status = client.predict("a sks dog", adapter="dog", seed=3, **DRAW)
    assert len(gallery) == 1 and seed == 3 and "1 picture in" in status
    pair, _ = client.predict("a sks dog", adapter="dog", steps=1, api_name="/compare")
    assert len(pair) == 2
    assert "no adapter mine" in get_refusal(client, "a dog", adapter="mine", **DRAW)
    for arguments, message in (
        ({"num_images": 9}, "maximum value 8"),
        ({"steps": 101}, "maximum value 100"),
        ({"size": "1024 x 1024"}, "at most 128 x 128 px"),
    ):
        assert message in get_refusal(client, "a dog", **DRAW | arguments)


def test_files_and_long_bodies_are_refused(served):
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
    headers = [(b"content-length", b"2"), (b"transfer-encoding", b"chunked")]
    assert refuse_long_body({"method": "POST", "headers": headers}).status_code == 413
    assert httpx.post(stop, json={"data": []}).status_code == 200


def test_form_limit_holds_the_longest_prompts():
    """What waits for the rest of a form stays in memory, for each of 65,536 connections."""
    texts = ["\N{DOG FACE}" * MAX_PROMPT_CHARACTERS] * 2
    assert len(json.dumps({"data": texts}, ensure_ascii=False).encode()) < MAX_FORM_BYTES
    assert 2**16 * MAX_FORM_BYTES <= 4 * 2**30


def test_foreign_image_is_not_opened(served, tmp_path):
    """Without `meta` gradio does not look where a file lies."""
    events = httpx.get(f"{served.url}config").json()["dependencies"]
    reuse = next(event["id"] for event in events if event["api_name"] == "restore_recipe")
    for file in (tmp_path / "owner.png", Path("/proc/self/fd/0"), tmp_path / "none.png"):
        item = {"image": {"path": str(file)}, "caption": None}
        body = {"fn_index": reuse, "session_hash": file.stem, "data": [[item], 0]}
        httpx.post(f"{served.url}gradio_api/queue/join", json=body)
        with httpx.stream(
            "GET", f"{served.url}gradio_api/queue/data?session_hash={file.stem}", timeout=60
        ) as answer:
            message = next(line for line in answer.iter_lines() if "process_completed" in line)
        assert "not one of this page" in message and '"success":false' in message.replace(" ", "")


def test_idle_sessions_are_dropped(served):
    for number in range(MAX_STOPS + 5):
        request = SimpleNamespace(session_hash=f"{number}" + "x" * 10_000)
        served.ctx.register_work(request)
    names = list(served.ctx._stops)
    assert len(names) == MAX_STOPS and max(map(len, names)) <= 32


def map_event_ids(served) -> dict[str, int]:
    """Name of an event -> its number."""
    config = httpx.get(f"{served.url}config").json()
    return {event["api_name"]: event["id"] for event in config["dependencies"]}


def read_last_message(served, session: str) -> str:
    """The last message of an event, as the session's stream tells it."""
    stream = f"{served.url}gradio_api/queue/data?session_hash={session}"
    with httpx.stream("GET", stream, timeout=60) as answer:
        return next(line for line in answer.iter_lines() if "process_completed" in line)


def join_queue(served, session: str, **arguments) -> httpx.Response:
    """The answer to one picture that a session asks for."""
    info = httpx.get(f"{served.url}gradio_api/info").json()["named_endpoints"]["/generate"]
    names = [parameter["parameter_name"] for parameter in info["parameters"]]
    defaults = [parameter.get("parameter_default") for parameter in info["parameters"]]
    data = list((dict(zip(names, defaults, strict=True)) | arguments).values())
    number = map_event_ids(served)["generate"]
    body = {"fn_index": number, "data": data, "session_hash": session}
    return httpx.post(f"{served.url}gradio_api/queue/join", json=body)


def test_odd_session_does_not_stop_the_queue(served, client):
    for session in ("", "a" * 65):
        answer = join_queue(served, session)
        assert not answer.is_success and "1 to 64 characters" in answer.text
    assert join_queue(served, "first").is_success and join_queue(served, "second").is_success
    served.page._queue.pending_messages_per_session.pop("second", None)
    gallery, *_ = client.predict("a sks dog", adapter="dog", seed=3, **DRAW)
    assert len(gallery) == 1


def test_dropped_session_leaves_no_events(served, client):
    """Its events' names stayed, and a task for each of its streams that were dropped."""
    queue = served.page._queue
    assert join_queue(served, "third").is_success
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
def test_unread_messages_are_limited(served, client, monkeypatch):
    """Every preview of a session that asked for pictures and never listened stayed in memory."""
    monkeypatch.setattr("dreambooth_moslora.ui.guard.MAX_UNREAD_MESSAGES", 12)
    assert all(join_queue(served, "deaf", prompt="a dog", steps=1).is_success for _ in range(4))
    gallery, *_ = client.predict("a sks dog", adapter="dog", seed=3, **DRAW)
    assert len(gallery) == 1
    places = served.page._queue.pending_messages_per_session
    assert "deaf" not in places and sum(messages.qsize() for messages in places.values()) <= 12


def test_gradio_cancel_is_refused(served):
    """Cancelled twice, it stayed in memory with its form, and another base drew nothing more."""
    event = join_queue(served, "quitter").json()["event_id"]
    number = map_event_ids(served)["generate"]
    body = {"session_hash": "quitter", "fn_index": number, "event_id": event}
    for path in ("cancel", "cancel/"):
        answer = httpx.post(f"{served.url}gradio_api/{path}", json=body)
        assert answer.status_code == 404 and answer.text == "not of this page"


@pytest.mark.parametrize("path", ["upload", "process_recording", "component_server"])
def test_path_with_line_break_is_refused(served, path):
    """Starlette takes it for the path without, so that a file was kept of whoever sent one."""
    answer = httpx.post(f"{served.url}gradio_api/{path}%0A", files={"files": ("a.png", b"x")})
    assert answer.status_code == 404 and answer.text == "not of this page"


def test_reload_stream_is_refused(served):
    """A thousand who did kept the page from answering anybody else."""
    with httpx.stream("GET", f"{served.url}gradio_api/dev/reload", timeout=10) as answer:
        assert answer.status_code == 404


def test_running_inputs_cannot_be_changed(served):
    event = join_queue(served, "swapper").json()["event_id"]
    body = {"data": [], "session_hash": "swapper"}
    answer = httpx.post(f"{served.url}gradio_api/stream/{event}", json=body)
    assert answer.status_code == 404 and answer.text == "not of this page"


def test_no_request_changes_others_answers(tiny_base, tmp_path):
    """Not on a page that answers to every name, either."""
    options = build_launch_options(any_host=True, public=True) | {"server_name": "127.0.0.2"}
    with serve(tiny_base, tmp_path, public=True, **options) as server:
        for path in ("info", "info/", "info?page=x"):
            url = f"{server.url}gradio_api/{path}"
            for headers in ({"X-Gradio-Server": "http://evil.example"}, {"Host": "evil.example"}):
                assert httpx.get(url, headers=headers).is_success
                answer = httpx.get(url)
                assert "generate" in answer.text and "evil.example" not in answer.text
        # Not to whoever asks at the same time, either: gradio keeps none.
        assert not server.page.app.api_info


def test_endless_header_is_cut_off(served):
    parts = urlsplit(served.url)
    with socket.create_connection((parts.hostname, parts.port), timeout=60) as connection:
        connection.sendall(f"GET / HTTP/1.1\r\nHost: {parts.netloc}\r\nX-A: ".encode())
        with suppress(ConnectionError):  # the server has gone
            for _ in range(64):
                connection.sendall(b"a" * 2**16)
        with suppress(ConnectionError):
            assert b" 200 " not in connection.recv(2**16)


@pytest.mark.slow
def test_stalled_connection_is_closed(served, monkeypatch):
    """Each kept 200 KB of a file in memory, for as long as it liked."""
    monkeypatch.setattr("dreambooth_moslora.ui.guard.STALL_SEC", 1)
    largest = max(Path(BUILD_PATH_LIB).glob("*.js"), key=lambda file: file.stat().st_size)
    parts = urlsplit(served.url)
    request = f"GET /assets/{largest.name} HTTP/1.1\r\nHost: {parts.netloc}\r\n\r\n"
    expected = 4 * largest.stat().st_size
    for pause, is_whole in ((0, True), (3, False)):
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.settimeout(60)
            connection.connect((parts.hostname, parts.port))
            connection.sendall(4 * request.encode())
            time.sleep(pause)
            received = 0
            with suppress(ConnectionError):
                while received < expected and (chunk := connection.recv(2**16)):
                    received += len(chunk)
        assert (received >= expected) == is_whole


def test_stream_is_not_compressed(served):
    """Gradio took it for a script, and kept 250 KB for each connection."""
    url = f"{served.url}gradio_api/heartbeat/x.js"
    with httpx.stream("GET", url, headers={"Accept-Encoding": "br"}) as answer:
        assert answer.is_success and "content-encoding" not in answer.headers
    page = httpx.get(f"{served.url}theme.css", headers={"Accept-Encoding": "br"})
    assert page.headers["content-encoding"] == "br"


def test_address_in_place_of_text_is_not_fetched(served, monkeypatch):
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


def test_address_is_not_fetched_after_an_image(served, monkeypatch):
    """By a frame that leaves the gallery as it is, gradio gives the session one of its own."""
    fetched = []

    async def fetch(url, *_, **options):
        fetched.append(url)
        raise OSError

    monkeypatch.setattr("gradio.processing_utils.async_ssrf_protected_download", fetch)
    monkeypatch.setattr(
        served.ctx, "get_loaded_pipeline", lambda: None
    )  # a frame without pictures, as previews
    assert join_queue(served, "painter", prompt="a dog", steps=1).is_success
    assert '"success":true' in read_last_message(served, "painter").replace(" ", "")
    evil = {"path": "https://evil.example/x.png", "meta": {"_type": "gradio.FileData"}}
    body = {"data": [[{"image": evil, "caption": None}], 0], "session_hash": "painter"}
    body["fn_index"] = map_event_ids(served)["restore_recipe"]
    assert httpx.post(f"{served.url}gradio_api/queue/join", json=body).is_success
    assert "fetches no address" in read_last_message(served, "painter") and not fetched


def test_form_with_many_files_is_refused(served):
    """A thousand of the page's own pictures kept it from answering anybody for seconds."""
    file = {"path": "a.png", "meta": {"_type": "gradio.FileData"}}
    describe, allowed = f"{served.url}gradio_api/run/describe", []
    for number in (MAX_FILES, MAX_FILES + 1):
        answer = httpx.post(describe, json={"data": ["dog", [file] * number]})
        allowed.append("too many files" not in answer.text)
    assert allowed == [True, False]


@pytest.mark.slow
def test_full_queue_refuses_the_next_request(served, monkeypatch):
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
