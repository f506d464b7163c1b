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
PRIVATE_PATHS = ("", "config", "gradio_api/token", "gradio_api/info", "gradio_api/app_id", "logout")


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


def get_user(url: str, headers: dict) -> str | None:
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
def test_foreign_site_cannot_use_the_login(proxied, origin):
    cookies = login(proxied.url, HOST)
    assert get_user(proxied.url, cookies) == "ann"
    for path in PRIVATE_PATHS:
        answer = httpx.get(f"{proxied.url}{path}", headers=cookies | {"Origin": origin})
        assert answer.status_code == 403 and "ann" not in answer.text, path
        assert not [name for name in answer.headers if name.startswith("access-control-")]
    assert get_user(proxied.url, cookies) == "ann"


def test_foreign_site_gets_no_frame_and_no_preflight(
    proxied,
):
    host = ELSEWHERE.removeprefix("https://")
    for scheme, status in (("http", 403), ("https", 200)):
        headers = {"Host": host, "Origin": f"{scheme}://{host}"}
        assert httpx.get(f"{proxied.url}gradio_api/token", headers=headers).status_code == status
    for path in ("", "login", "nothing"):
        policy = httpx.get(f"{proxied.url}{path}", headers=HOST).headers["content-security-policy"]
        assert policy == "frame-ancestors 'self'"
    preflight = HOST | EVIL | {"Access-Control-Request-Method": "POST"}
    answer = httpx.options(f"{proxied.url}gradio_api/queue/join", headers=preflight)
    assert answer.status_code == 403 and "access-control-allow-origin" not in answer.headers


def test_cookie_backslashes_are_removed(proxied):
    """Python before 3.11.10 reads 60 KB of them in half a minute, in the loop that answers all."""
    cookie = 'other="' + r"\"" * 4000 + '"'
    headers = login(proxied.url, HOST)
    headers["Cookie"] += f"; {cookie}"
    raw_headers = [(b"cookie", headers["Cookie"].encode()), (b"host", PROXY.encode())]
    passed = []

    async def app(scope, *_) -> None:
        passed.extend(scope["headers"])

    guarded = guard.TrustedHosts(app, None)
    scope = {"type": "http", "path": "/", "query_string": b"", "headers": raw_headers}
    asyncio.run(guarded(scope, None, None))
    assert b"\\" not in dict(passed)[b"cookie"]
    # The page's own are read as before.
    assert get_user(proxied.url, headers) == "ann"


def test_second_start_does_not_guard_twice():
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
def test_page_behind_proxy_reaches_itself_by_any_passed_host(proxied, host, origin):
    assert get_user(proxied.url, login(proxied.url, {"Host": host, "Origin": origin})) == "ann"


@pytest.mark.parametrize("path", ["logout", "logout/", "gradio_api/info"])
def test_cross_site_fetch_reaches_only_the_page_itself(proxied, path):
    """Such a request tells no origin, and the browser sends the login along."""
    cookies = login(proxied.url, HOST)
    for site in ("cross-site", "same-site"):
        foreign = cookies | {"Sec-Fetch-Site": site}
        assert httpx.get(f"{proxied.url}{path}", headers=foreign).status_code == 403
        assert httpx.get(proxied.url, headers=foreign).status_code == 200
    assert get_user(proxied.url, cookies | {"Sec-Fetch-Site": "same-origin"}) == "ann"


def test_loopback_page_answers_only_its_own_names(
    served,
):
    assert httpx.get(served.url, headers={"Host": "evil.example:80"}).status_code == 421
    for path in ("monitoring/summary", "monitoring"):
        assert httpx.get(f"{served.url}{path}").status_code in (403, 404)
    port = served.url.rstrip("/").rpartition(":")[2]
    foreign_origins = (
        "http://localhost:9999",
        "http://127.0.0.1:9999",
        "http://127.0.0.1",
        f"http://localhost:{port}",
    )
    for origin in ("http://evil.example", *foreign_origins, f"http://127.0.0.1:{port}"):
        headers, status = {"Origin": origin}, 200 if origin == served.url.rstrip("/") else 403
        for path, content in (
            ("call/adapters", {"json": {"data": []}}),
            ("upload", {"files": {"files": ("a", b"x")}}),
        ):
            response = httpx.post(f"{served.url}gradio_api/{path}", headers=headers, **content)
            assert response.status_code == status, (origin, path)


def test_exposed_page_refuses_foreign_requests(exposed):
    cookies = login(exposed.url, {"Origin": exposed.url.rstrip("/")})
    assert "access-token" in cookies["Cookie"]
    calls = {
        "login": {"data": LOGIN},
        "gradio_api/upload": {"files": {"files": ("a.png", b"x")}},
        "gradio_api/call/adapters": {"json": {"data": []}},
        "gradio_api/run/stop": {"json": {"data": []}},
    }
    for path, content in calls.items():
        for headers, status in ((cookies | EVIL, 403), (cookies, 200)):
            assert (
                httpx.post(f"{exposed.url}{path}", headers=headers, **content).status_code == status
            ), path
    for path in PRIVATE_PATHS:
        assert httpx.get(f"{exposed.url}{path}", headers=cookies | EVIL).status_code == 403, path


def test_exposed_page_answers_any_host_that_is_the_origin(exposed):
    for headers, status in (
        ({"Host": "example.org", "Origin": "https://example.org"}, 200),
        ({"Host": "example.org:80", "Origin": "http://example.org"}, 200),
        ({"Host": "example.org", "Origin": "https://example.org:1"}, 403),
        ({"X-Forwarded-Host": "example.org", "Origin": "https://example.org"}, 200),
    ):
        assert httpx.get(exposed.url, headers=headers).status_code == status
    assert Client(exposed.url, auth=("ann", "secret"), verbose=False).predict(api_name="/adapters")


def test_forwarded_host_must_be_allowed(proxied, served):
    cookies = login(proxied.url, HOST | {"X-Forwarded-Host": PROXY})
    assert httpx.get(f"{proxied.url}config", headers=cookies).json()["root"].endswith(f"//{PROXY}")
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


def test_allowed_host_may_be_an_address():
    for text, origins in ADDRESSES.items():
        assert parse_origins(text) == {(scheme, PROXY, port) for scheme, port in origins}
    for text in ("https://", "", f"ftp://{PROXY}", f"{PROXY}:port"):
        with pytest.raises(UserError, match="is not a host name"):
            parse_origins(text)


def test_connection_limit_is_raised():
    """As many that said nothing kept everybody else out."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 1024), hard))
    try:
        guard.raise_connection_limit()
        raised_limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert raised_limit == min(hard % 2**64, guard.MAX_CONNECTIONS)  # -1: no limit


def test_late_page_counts_as_started(monkeypatch):
    """On a busy machine gradio gave up at the first of its questions that timed out."""
    answers = iter([False, False, True])
    monkeypatch.setattr(networking, "url_ok", lambda url: next(answers))
    page.patch_url_probe.__wrapped__()
    assert networking.url_ok("http://127.0.0.1/")
    assert list(answers) == []


def test_odd_range_header_is_ignored(served):
    """gradio knows two numbers."""
    sent = httpx.post(f"{served.url}gradio_api/upload", files={"files": ("a.png", bytes(100))})
    file = f"{served.url}gradio_api/file={sent.json()[0]}"
    answer = httpx.get(file, headers={"Range": "bytes=0-1-2"})
    assert (answer.status_code, len(answer.content)) == (200, 100)
