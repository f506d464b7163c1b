"""No other site reaches the page through a browser, and the page answers to its own names only."""

import asyncio
import resource
from types import SimpleNamespace

import httpx
import pytest
from gradio import networking
from gradio_client import Client

from dreambooth_moslora.errors import UserError
from dreambooth_moslora.ui import guard, page
from dreambooth_moslora.ui.guard import parse_origins
from dreambooth_moslora.ui.page import build_launch_options
from tests.helpers.ui_server import serve

PROXY = "pictures.example.org"
ELSEWHERE = "https://drawings.example.org:8443"
LOGIN = {"username": "ann", "password": "secret"}
AUTH = {"auth": [("ann", "secret")]}
EVIL = {"Origin": "https://evil.example"}
HOST = {"Host": PROXY}
PATHS = ("", "config", "gradio_api/token", "gradio_api/info", "gradio_api/app_id", "logout")


@pytest.fixture(scope="module")
def proxied(tiny_base, tmp_path_factory):
    """Behind a proxy that calls the page by its public name, with a login."""
    options = build_launch_options(parse_origins(PROXY) | parse_origins(ELSEWHERE)) | AUTH
    with serve(tiny_base, tmp_path_factory.mktemp("app"), **options) as server:
        yield server


@pytest.fixture(scope="module")
def exposed(tiny_base, tmp_path_factory):
    """On an address of the network, with a login."""
    options = build_launch_options(any_host=True) | {"server_name": "127.0.0.2"} | AUTH
    with serve(tiny_base, tmp_path_factory.mktemp("app"), **options) as server:
        yield server


def login(url: str, headers: dict) -> dict:
    """The headers of a browser that has logged in, behind an encrypting proxy."""
    answer = httpx.post(f"{url}login", data=LOGIN, headers=headers)
    return headers | {
        "Cookie": "; ".join(line.split(";")[0] for line in answer.headers.get_list("set-cookie"))
    }


def user(url: str, headers: dict) -> str | None:
    return httpx.get(f"{url}gradio_api/token", headers=headers).json()["user"]


FOREIGN = [
    "https://evil.example",
    "null",
    f"https://evil.{PROXY}",
    "https://[",
    "file://",
    f"https://{PROXY}:port",
]
FOREIGN += [
    f"https://{PROXY}:8443",
    f"http://{PROXY}:81",
    f"http://{PROXY}:443",
    "https://drawings.example.org",
]


@pytest.mark.parametrize("origin", [*FOREIGN, ELSEWHERE.replace("https", "http")])
def test_a_foreign_site_reads_nothing_by_a_users_login(proxied, origin):
    mine = login(proxied.url, HOST)
    assert user(proxied.url, mine) == "ann"
    for path in PATHS:
        answer = httpx.get(f"{proxied.url}{path}", headers=mine | {"Origin": origin})
        assert answer.status_code == 403 and "ann" not in answer.text, path
        assert not [name for name in answer.headers if name.startswith("access-control-")]
    assert user(proxied.url, mine) == "ann"


def test_plain_http_is_another_site_and_no_foreign_one_frames_the_page_or_is_answered_beforehand(
    proxied,
):
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


def test_a_cookie_of_backslashes_does_not_hold_the_page_up(proxied):
    """Python before 3.11.10 reads 60 KB of them in half a minute, in the loop that answers all."""
    cookie = 'other="' + r"\"" * 4000 + '"'
    mine = login(proxied.url, HOST)
    mine["Cookie"] += f"; {cookie}"
    asked = [(b"cookie", mine["Cookie"].encode()), (b"host", PROXY.encode())]
    passed = []

    async def app(scope, *_) -> None:
        passed.extend(scope["headers"])

    guarded = guard.TrustedHosts(app, None)
    scope = {"type": "http", "path": "/", "query_string": b"", "headers": asked}
    asyncio.run(guarded(scope, None, None))
    assert b"\\" not in dict(passed)[b"cookie"]
    # The page's own are read as before.
    assert user(proxied.url, mine) == "ann"


def test_a_server_that_gradio_starts_twice_is_guarded_once():
    """It tries another port after five seconds; each answer then had its headers twice."""

    async def start_twice(app) -> None:
        for _ in range(2):
            async with guard.install_trusted_hosts(None, (), app):
                pass

    asyncio.run(start_twice(app := SimpleNamespace(middleware_stack=lambda: None)))
    assert isinstance(app.middleware_stack, guard.TrustedHosts)
    assert not isinstance(app.middleware_stack.app, guard.TrustedHosts)


@pytest.mark.parametrize("origin", [f"https://{PROXY}", f"http://{PROXY}", ELSEWHERE])
@pytest.mark.parametrize("host", [PROXY, f"{PROXY}:443", "127.0.0.1:7860"])
def test_the_page_behind_a_proxy_may_ask_itself_by_whatever_name_the_proxy_passes_on(
    proxied, host, origin
):
    assert user(proxied.url, login(proxied.url, {"Host": host, "Origin": origin})) == "ann"


@pytest.mark.parametrize("path", ["logout", "logout/", "gradio_api/info"])
def test_another_sites_picture_asks_for_nothing_and_its_link_leads_to_the_page_alone(proxied, path):
    """Such a request tells no origin, and the browser sends the login along."""
    mine = login(proxied.url, HOST)
    for site in ("cross-site", "same-site"):
        foreign = mine | {"Sec-Fetch-Site": site}
        assert httpx.get(f"{proxied.url}{path}", headers=foreign).status_code == 403
        assert httpx.get(proxied.url, headers=foreign).status_code == 200
    assert user(proxied.url, mine | {"Sec-Fetch-Site": "same-origin"}) == "ann"


def test_a_page_on_the_loopback_answers_to_its_own_names_to_no_other_program_and_has_no_monitor(
    served,
):
    assert httpx.get(served.url, headers={"Host": "evil.example:80"}).status_code == 421
    for path in ("monitoring/summary", "monitoring"):
        assert httpx.get(f"{served.url}{path}").status_code in (403, 404)
    port = served.url.rstrip("/").rpartition(":")[2]
    others = (
        "http://localhost:9999",
        "http://127.0.0.1:9999",
        "http://127.0.0.1",
        f"http://localhost:{port}",
    )
    for origin in ("http://evil.example", *others, f"http://127.0.0.1:{port}"):
        headers, status = {"Origin": origin}, 200 if origin == served.url.rstrip("/") else 403
        for path, content in (
            ("call/adapters", {"json": {"data": []}}),
            ("upload", {"files": {"files": ("a", b"x")}}),
        ):
            asked = httpx.post(f"{served.url}gradio_api/{path}", headers=headers, **content)
            assert asked.status_code == status, (origin, path)


def test_a_page_of_the_network_takes_nothing_that_another_site_sends(exposed):
    mine = login(exposed.url, {"Origin": exposed.url.rstrip("/")})
    assert "access-token" in mine["Cookie"]
    calls = {
        "login": {"data": LOGIN},
        "gradio_api/upload": {"files": {"files": ("a.png", b"x")}},
        "gradio_api/call/adapters": {"json": {"data": []}},
        "gradio_api/run/stop": {"json": {"data": []}},
    }
    for path, content in calls.items():
        for headers, status in ((mine | EVIL, 403), (mine, 200)):
            assert (
                httpx.post(f"{exposed.url}{path}", headers=headers, **content).status_code == status
            ), path
    for path in PATHS:
        assert httpx.get(f"{exposed.url}{path}", headers=mine | EVIL).status_code == 403, path


def test_a_page_of_the_network_answers_to_any_name_that_is_also_the_origin(exposed):
    for headers, status in (
        ({"Host": "example.org", "Origin": "https://example.org"}, 200),
        ({"Host": "example.org:80", "Origin": "http://example.org"}, 200),
        ({"Host": "example.org", "Origin": "https://example.org:1"}, 403),
        ({"X-Forwarded-Host": "example.org", "Origin": "https://example.org"}, 200),
    ):
        assert httpx.get(exposed.url, headers=headers).status_code == status
    assert Client(exposed.url, auth=("ann", "secret"), verbose=False).predict(api_name="/adapters")


def test_a_forwarded_name_is_believed_only_when_it_is_allowed(proxied, served):
    mine = login(proxied.url, HOST | {"X-Forwarded-Host": PROXY})
    assert httpx.get(f"{proxied.url}config", headers=mine).json()["root"].endswith(f"//{PROXY}")
    for odd in ("evil.example", "evil.example:port", "[", "", f"{PROXY}:abc", f"{PROXY}:99999999"):
        for path in ("config", "gradio_api/info?all_endpoints=", ""):
            answer = httpx.get(f"{served.url}{path}", headers={"X-Forwarded-Host": odd})
            assert (
                answer.status_code == 200
                and "evil.example" not in answer.text
                and PROXY not in answer.text
            )


ADDRESSES = {
    "Pictures.Example.org": {("http", 80), ("https", 443)},
    "pictures.example.org:8443": {("http", 8443), ("https", 8443)},
    "https://pictures.example.org/": {("https", 443)},
    "https://pictures.example.org:8443": {("https", 8443)},
}


def test_an_allowed_host_may_be_written_as_an_address_and_what_is_none_is_refused():
    for text, places in ADDRESSES.items():
        assert parse_origins(text) == {(scheme, PROXY, port) for scheme, port in places}
    for text in ("https://", "", f"ftp://{PROXY}", f"{PROXY}:port"):
        with pytest.raises(UserError, match="is not a host name"):
            parse_origins(text)


def test_a_page_holds_more_connections_than_the_usual_thousand():
    """As many that said nothing kept everybody else out."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 1024), hard))
    try:
        guard.raise_connection_limit()
        held, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert held == min(hard % 2**64, guard.MAX_CONNECTIONS)  # -1: no limit


def test_a_page_that_answers_late_has_started(monkeypatch):
    """On a busy machine gradio gave up at the first of its questions that timed out."""
    answers = iter([False, False, True])
    monkeypatch.setattr(networking, "url_ok", lambda url: next(answers))
    page.patch_url_probe.__wrapped__()
    assert networking.url_ok("http://127.0.0.1/")
    assert list(answers) == []


def test_an_odd_range_of_a_file_is_no_error_of_the_server(served):
    """gradio knows two numbers."""
    sent = httpx.post(f"{served.url}gradio_api/upload", files={"files": ("a.png", bytes(100))})
    file = f"{served.url}gradio_api/file={sent.json()[0]}"
    answer = httpx.get(file, headers={"Range": "bytes=0-1-2"})
    assert (answer.status_code, len(answer.content)) == (200, 100)
