"""No other site reaches the page through a browser, no upload fills memory or disk, and no odd request is a 500."""

import asyncio
import contextlib
import http.client
import secrets
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import httpx
import psutil
import pytest
from gradio_client import Client

from dreambooth_moslora.core import UserError
from dreambooth_moslora.ui import guard
from dreambooth_moslora.ui.guard import MAX_BODY_BYTES, origins_of
from dreambooth_moslora.ui.page import launch_options
from tests.helpers.ui_server import PROXY, cookie_of, serve
from tests.ui.conftest import wait_for

MIB = 2**20
ELSEWHERE = "https://drawings.example.org:8443"
LOGIN = {"username": "ann", "password": "secret"}
AUTH = {"auth": [("ann", "secret")]}
EVIL = {"Origin": "https://evil.example"}
HOST = {"Host": PROXY}
PATHS = ("", "config", "gradio_api/token", "gradio_api/info", "gradio_api/app_id", "logout")


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


@pytest.fixture(scope="module")
def proxied(tiny_base, tmp_path_factory):
    """Behind a proxy that calls the page by its public name, with a login."""
    options = launch_options(origins_of(PROXY) | origins_of(ELSEWHERE)) | AUTH
    with serve(tiny_base, tmp_path_factory.mktemp("app"), **options) as server:
        yield server


@pytest.fixture(scope="module")
def public(tiny_base, tmp_path_factory):
    """On an address of the network, with a login."""
    options = launch_options(any_host=True) | {"server_name": "127.0.0.2"} | AUTH
    with serve(tiny_base, tmp_path_factory.mktemp("app"), **options) as server:
        yield server


def login(url: str, headers: dict) -> dict:
    """The headers of a browser that has logged in, behind an encrypting proxy."""
    answer = httpx.post(f"{url}login", data=LOGIN, headers=headers)
    return headers | {"Cookie": "; ".join(line.split(";")[0] for line in answer.headers.get_list("set-cookie"))}


def user(url: str, headers: dict) -> str | None:
    return httpx.get(f"{url}gradio_api/token", headers=headers).json()["user"]


FOREIGN = ["https://evil.example", "null", f"https://evil.{PROXY}", "https://[", "file://", f"https://{PROXY}:port"]
FOREIGN += [f"https://{PROXY}:8443", f"http://{PROXY}:81", f"http://{PROXY}:443", "https://drawings.example.org"]


@pytest.mark.parametrize("origin", [*FOREIGN, ELSEWHERE.replace("https", "http")])
def test_a_foreign_site_reads_nothing_by_a_visitors_login(proxied, origin):
    mine = login(proxied.url, HOST)
    assert user(proxied.url, mine) == "ann"
    for path in PATHS:
        answer = httpx.get(f"{proxied.url}{path}", headers=mine | {"Origin": origin})
        assert answer.status_code == 403 and "ann" not in answer.text, path
        assert not [name for name in answer.headers if name.startswith("access-control-")]
    assert user(proxied.url, mine) == "ann"


def test_plain_http_is_another_site_no_foreign_one_has_the_page_in_a_frame_or_is_answered_when_it_asks_before(proxied):
    host = ELSEWHERE.removeprefix("https://")
    for scheme, status in (("http", 403), ("https", 200)):
        headers = {"Host": host, "Origin": f"{scheme}://{host}"}
        assert httpx.get(f"{proxied.url}gradio_api/token", headers=headers).status_code == status
    for path in ("", "login", "nothing"):
        policy = httpx.get(f"{proxied.url}{path}", headers=HOST).headers["content-security-policy"]
        assert policy == "frame-ancestors 'self'"
    asked = HOST | EVIL | {"Access-Control-Request-Method": "POST"}
    answer = httpx.options(f"{proxied.url}gradio_api/queue/join", headers=asked)
    assert answer.status_code == 403 and "access-control-allow-origin" not in answer.headers


def test_a_server_that_gradio_starts_twice_is_guarded_once():
    """It tries another port after five seconds; each answer then had its headers twice."""

    async def start_twice(app) -> None:
        for _ in range(2):
            async with guard.trusted_hosts(None, (), app):
                pass

    asyncio.run(start_twice(app := SimpleNamespace(middleware_stack=lambda: None)))
    assert isinstance(app.middleware_stack, guard.TrustedHosts)
    assert not isinstance(app.middleware_stack.app, guard.TrustedHosts)


@pytest.mark.parametrize("origin", [f"https://{PROXY}", f"http://{PROXY}", ELSEWHERE])
@pytest.mark.parametrize("host", [PROXY, f"{PROXY}:443", "127.0.0.1:7860"])
def test_the_page_behind_a_proxy_may_ask_itself_by_whatever_name_the_proxy_passes_on(proxied, host, origin):
    assert user(proxied.url, login(proxied.url, {"Host": host, "Origin": origin})) == "ann"


@pytest.mark.parametrize("path", ["logout", "logout/"])
def test_another_sites_picture_or_link_logs_nobody_out_and_has_no_login_sent_along(proxied, path):
    """Such a request tells no origin."""
    answer = httpx.post(f"{proxied.url}login", data=LOGIN, headers=HOST)
    cookies = [line.lower() for line in answer.headers.get_list("set-cookie")]
    assert len(cookies) == 2
    assert all("samesite=lax" in line and "samesite=none" not in line and "httponly" in line for line in cookies)
    mine = login(proxied.url, HOST)
    for site in ("cross-site", "same-site"):
        answer = httpx.get(f"{proxied.url}{path}", headers=mine | {"Sec-Fetch-Site": site})
        assert answer.status_code in (403, 404) and user(proxied.url, mine) == "ann"
    assert httpx.get(f"{proxied.url}logout", headers=mine | {"Sec-Fetch-Site": "same-origin"}).status_code == 302
    assert user(proxied.url, mine) is None


def test_a_page_on_the_loopback_answers_only_to_its_own_names_to_no_other_program_and_has_no_monitor(served):
    assert httpx.get(served.url, headers={"Host": "evil.example:80"}).status_code == 421
    for path in ("monitoring/summary", "monitoring"):
        assert httpx.get(f"{served.url}{path}").status_code in (403, 404)
    port = served.url.rstrip("/").rpartition(":")[2]
    others = ("http://localhost:9999", "http://127.0.0.1:9999", "http://127.0.0.1", f"http://localhost:{port}")
    for origin in ("http://evil.example", *others, f"http://127.0.0.1:{port}"):
        is_own, headers = origin == served.url.rstrip("/"), {"Origin": origin}
        answer = httpx.post(f"{served.url}gradio_api/call/adapters", json={"data": []}, headers=headers)
        assert (answer.status_code, upload(served, b"x", **headers).status_code) == (
            (200,) * 2 if is_own else (403,) * 2
        )


def test_a_public_page_takes_nothing_that_another_site_sends(public):
    mine = login(public.url, {"Origin": public.url.rstrip("/")})
    assert "access-token" in mine["Cookie"]
    calls = {
        "login": {"data": LOGIN},
        "gradio_api/upload": {"files": {"files": ("a.png", b"x")}},
        "gradio_api/call/adapters": {"json": {"data": []}},
        "gradio_api/run/stop": {"json": {"data": []}},
    }
    for path, content in calls.items():
        for headers, status in ((mine | EVIL, 403), (mine, 200)):
            assert httpx.post(f"{public.url}{path}", headers=headers, **content).status_code == status, path
    for path in PATHS:
        assert httpx.get(f"{public.url}{path}", headers=mine | EVIL).status_code == 403, path


def test_a_public_page_answers_to_any_name_that_is_also_the_origin(public):
    for headers, status in (
        ({"Host": "example.org", "Origin": "https://example.org"}, 200),
        ({"Host": "example.org:80", "Origin": "http://example.org"}, 200),
        ({"Host": "example.org", "Origin": "https://example.org:1"}, 403),
        ({"X-Forwarded-Host": "example.org", "Origin": "https://example.org"}, 200),
    ):
        assert httpx.get(public.url, headers=headers).status_code == status
    assert Client(public.url, auth=("ann", "secret"), verbose=False).predict(api_name="/adapters")


def test_a_forwarded_name_is_believed_only_when_it_is_allowed(proxied, served, api):
    mine = login(proxied.url, HOST | {"X-Forwarded-Host": PROXY})
    assert httpx.get(f"{proxied.url}config", headers=mine).json()["root"].endswith(f"//{PROXY}")
    for path in ("config", "gradio_api/info?all_endpoints=", ""):
        answer = httpx.get(f"{served.url}{path}", headers={"X-Forwarded-Host": "evil.example"})
        assert "evil.example" not in answer.text, path
    ports = [f"{PROXY}:{port}" for port in ("abc", "99999999", "-1")]
    for odd in ("evil.example:port", "[", "", *ports):
        answer = httpx.get(f"{served.url}config", headers={"X-Forwarded-Host": odd})
        assert answer.status_code == 200 and PROXY not in answer.json()["root"]


ADDRESSES = {
    "Pictures.Example.org": {("http", 80), ("https", 443)},
    "pictures.example.org:8443": {("http", 8443), ("https", 8443)},
    "https://pictures.example.org/": {("https", 443)},
    "https://pictures.example.org:8443": {("https", 8443)},
}


def test_an_allowed_host_may_be_written_as_an_address_and_what_is_none_is_refused():
    for text, places in ADDRESSES.items():
        assert origins_of(text) == {(scheme, PROXY, port) for scheme, port in places}
    for text in ("https://", "", f"ftp://{PROXY}", f"{PROXY}:port"):
        with pytest.raises(UserError, match="is not a host name"):
            origins_of(text)


def test_a_part_of_a_file_comes_without_the_visitors_cookie(served):
    mine = {"Cookie": "moslora_visitor=secret", "Range": "bytes=0-1"}
    path = upload(served, b"abc", **mine).json()[0]
    answer = httpx.get(f"{served.url}gradio_api/file={path}", headers=mine)
    assert (answer.status_code, answer.content) == (206, b"ab")
    assert "secret" not in str(answer.headers) and "host" not in answer.headers and "range" not in answer.headers


@pytest.fixture
def api(served, capfd):
    """Its address; the log must stay without a traceback."""
    yield f"{served.url}gradio_api"
    assert "Traceback" not in "".join(capfd.readouterr())


def test_an_upload_with_an_odd_name_or_too_long_a_boundary(api):
    kind = "multipart/form-data; boundary="
    for name in ("", "/", "a" * 300):
        sent = f'--b\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\nx\r\n--b--\r\n'
        answer = httpx.post(f"{api}/upload", content=sent, headers={"Content-Type": f"{kind}b"})
        assert answer.status_code in (200, 400)
    answer = httpx.post(f"{api}/upload", content=b"x", headers={"Content-Type": kind + "x" * 5000})
    assert answer.status_code == 400 and "boundary" in answer.text


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


FIELD, FILE = 'form-data; name="files"', 'form-data; name="files"; filename="a.png"'
NOTE = 'form-data; name="note"'
DISGUISED = f'{NOTE}\r\nContent-Type: image/png; filename="a.png"'
KIND = {"Content-Type": "multipart/form-data; boundary=edge"}


def upload(served, content: bytes, **headers: str) -> httpx.Response:
    return httpx.post(f"{served.url}gradio_api/upload", files={"files": ("a.png", content)}, headers=headers)


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


@pytest.fixture
def kept(stored):
    """Nothing but what has been there before is kept of an upload."""
    before = files_in(stored)
    yield before
    wait_for(lambda: files_in(stored) == before, 20)


@pytest.mark.parametrize("field", [NOTE, DISGUISED], ids=["plain", "disguised"])
@pytest.mark.parametrize("before", [0, 1], ids=["alone", "after a file"])
def test_a_field_that_is_no_file_is_not_taken_into_memory(served, kept, before, field):
    memory = psutil.Process().memory_info()
    assert sent(served, *[part(FILE, 1)] * before, part(field, 400)) == 413
    assert psutil.Process().memory_info().rss - memory.rss < 60 * MIB


@pytest.mark.parametrize(
    ("parts", "status"),
    [
        ([(NOTE, 1)] * 6, 413),  # small fields count together
        ([(FILE, 3)] * 3, 413),  # and so do files
        ([(FILE, 1), (FIELD, 1)], 400),  # a text in the place of a file
    ],
)
def test_what_is_refused_leaves_nothing_on_the_disk(served, kept, monkeypatch, parts, status):
    monkeypatch.setattr(guard, "MAX_UPLOAD_BYTES", 4 * MIB)
    assert sent(served, *(part(*one) for one in parts)) == status


def begun(served, size: int) -> http.client.HTTPConnection:
    """An upload that promises so many bytes."""
    connection = http.client.HTTPConnection(urlsplit(served.url).netloc, timeout=20)
    connection.putrequest("POST", "/gradio_api/upload")
    for name, value in (KIND | {"Content-Length": str(size)}).items():
        connection.putheader(name, value)
    connection.endheaders()
    return connection


def test_an_upload_that_promises_too_much_is_refused_before_it_is_read_and_one_whose_sender_leaves_not_kept(
    served, stored, kept
):
    assert begun(served, guard.MAX_UPLOAD_BYTES + MAX_BODY_BYTES + 1).getresponse().status == 413
    connection = begun(served, 8 * MIB)
    connection.send(b"".join(part(FILE, 4)))
    wait_for(lambda: files_in(stored) != kept, 20)
    connection.close()


def test_files_are_taken_together_longer_than_a_form_and_an_edge_inside_one_is_part_of_it(served):
    inside, long = b"--edg\r\nContent-Disposition: form-data\r\n\r\n" * 1000, b"x" * (MAX_BODY_BYTES + MIB)
    files = [("files", ("a.png", inside)), ("files", ("b.png", long))]
    answer = httpx.post(f"{served.url}gradio_api/upload", files=files)
    assert [Path(path).read_bytes() for path in answer.json()] == [inside, long]


def mebibyte(served, visitor: str, content: bytes = b"") -> Path:
    """A file of one MiB, of its own content if none is given."""
    answer = upload(served, content or secrets.token_bytes(MIB), **cookie_of(visitor))
    return Path(answer.raise_for_status().json()[0])


def test_the_oldest_uploads_make_room_for_the_newest_which_stays_unless_it_would_fill_the_disk(served, monkeypatch):
    monkeypatch.setattr(guard, "MAX_BYTES_EACH", 3 * MIB)
    others = mebibyte(served, "bob")
    mine = [mebibyte(served, "eve") for _ in range(5)]
    wait_for(lambda: not mine[1].exists(), 20)  # it is noted after the answer
    assert [path.is_file() for path in (*mine, others)] == [False, False, True, True, True, True]
    monkeypatch.setattr(guard, "MAX_BYTES_EACH", MIB // 2)
    assert mebibyte(served, "dan").is_file()
    monkeypatch.setattr(guard, "DISK_RESERVE_BYTES", 2**60)
    answer = upload(served, b"x" * MIB)
    assert answer.status_code == 507 and "disk" in answer.text


def test_a_file_that_two_visitors_sent_stays_for_the_other(served, monkeypatch):
    monkeypatch.setattr(guard, "MAX_BYTES_EACH", 1 * MIB)
    content = secrets.token_bytes(MIB)
    shared = mebibyte(served, "ann", content)
    assert mebibyte(served, "cleo", content) == shared
    own, again = mebibyte(served, "cleo"), mebibyte(served, "cleo")
    wait_for(lambda: not own.exists(), 20)
    assert shared.is_file() and again.is_file()
