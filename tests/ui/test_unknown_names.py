"""What a request names and the page does not have is refused in words: no traceback in the log, no 500."""

import httpx
import pytest

from dreambooth_moslora.ui.guard import origins_of
from dreambooth_moslora.ui.page import launch_options
from tests.helpers.ui_server import serve

ASKED = {"data": [], "session_hash": "nobody"}


@pytest.fixture(scope="module")
def served(tiny_base, tmp_path_factory):
    with serve(
        tiny_base, tmp_path_factory.mktemp("app"), **launch_options(origins_of("pictures.example.org"))
    ) as server:
        yield server


@pytest.fixture
def api(served, capfd):
    """Its address; the log must stay without a traceback."""
    yield f"{served.url}gradio_api"
    assert "Traceback" not in "".join(capfd.readouterr())


@pytest.mark.parametrize(
    "path", ["run/nothing", "api/nothing", "call/nothing", "call/v2/nothing", "run/nothing/", "call/v2/nothing/"]
)
def test_a_function_of_no_such_name(api, path):
    answer = httpx.post(f"{api}/{path}", json={"data": []})
    assert (answer.status_code, answer.text) == (404, "there is no such function")


@pytest.mark.parametrize("number", [9999, -1])
@pytest.mark.parametrize("path", ["run/predict", "api/predict", "queue/join"])
def test_a_function_of_no_such_number(api, path, number):
    assert httpx.post(f"{api}/{path}", json=ASKED | {"fn_index": number}).status_code == 404


@pytest.mark.parametrize("number", [9999, "x", [1]])
def test_a_component_of_no_such_number(api, number):
    asked = ASKED | {"component_id": number, "fn_name": "x"}
    assert httpx.post(f"{api}/component_server", json=asked).status_code == 404


@pytest.mark.parametrize(
    "path", ["queue/data?session_hash=nobody", "call/generate/nothing", "call/v2/generate/nothing"]
)
def test_a_stream_of_nothing(api, path):
    assert httpx.get(f"{api}/{path}").status_code == 404


@pytest.mark.parametrize("asked", ["0-1-2", "0-0,5-6", "a-b", "-", "5-2", "999999999999999999999-"])
def test_a_range_that_is_none(api, asked):
    (path,) = httpx.post(f"{api}/upload", files={"files": ("a.png", b"0123456789")}).json()
    answer = httpx.get(f"{api}/file={path}", headers={"Range": f"bytes={asked}"})
    assert answer.status_code in (200, 206, 400, 416)
    assert httpx.get(f"{api}/file={path}", headers={"Range": "bytes=2-4"}).text == "234"


@pytest.mark.parametrize("port", ["abc", "99999999", "-1"])
def test_a_proxys_name_with_a_port_that_is_none(served, api, port):
    answer = httpx.get(f"{served.url}config", headers={"X-Forwarded-Host": f"pictures.example.org:{port}"})
    assert answer.status_code == 200 and "pictures.example.org" not in answer.json()["root"]


@pytest.mark.parametrize("name", ["", "/", "a" * 300])
def test_an_upload_with_an_odd_name(api, name):
    sent = f'--b\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\nx\r\n--b--\r\n'
    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    assert httpx.post(f"{api}/upload", content=sent, headers=headers).status_code in (200, 400)
