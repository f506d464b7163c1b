"""No page of another site reads from the page, sends to it or ends a login, through a visitor's browser."""

import httpx
import pytest
from gradio_client import Client

from dreambooth_moslora.ui.guard import origins_of
from dreambooth_moslora.ui.page import launch_options
from tests.helpers.ui_server import serve

NAME = "pictures.example.org"
ELSEWHERE = "https://drawings.example.org:8443"
LOGIN = {"username": "ann", "password": "secret"}
EVIL = {"Origin": "https://evil.example"}
PATHS = ("", "config", "gradio_api/token", "gradio_api/info", "gradio_api/app_id", "logout")


def cookie_of(url: str, headers: dict) -> str:
    """The login as a browser behind an encrypting proxy would send it."""
    answer = httpx.post(f"{url}login", data=LOGIN, headers=headers)
    return "; ".join(line.split(";")[0] for line in answer.headers.get_list("set-cookie"))


@pytest.fixture(scope="module")
def proxied(tiny_base, tmp_path_factory):
    """Behind a proxy that calls the page by its public name, with a login."""
    options = launch_options(origins_of(NAME) | origins_of(ELSEWHERE)) | {"auth": [("ann", "secret")]}
    with serve(tiny_base, tmp_path_factory.mktemp("app"), **options) as server:
        yield server


@pytest.fixture(scope="module")
def public(tiny_base, tmp_path_factory):
    """On an address of the network, with a login."""
    options = launch_options(public=True) | {"server_name": "127.0.0.2", "auth": [("ann", "secret")]}
    with serve(tiny_base, tmp_path_factory.mktemp("app"), **options) as server:
        yield server


FOREIGN = ("https://evil.example", "null", f"https://evil.{NAME}", "https://[", "file://", f"https://{NAME}:port")
OTHER_PORTS = (f"https://{NAME}:8443", f"http://{NAME}:81", f"http://{NAME}:443", "https://drawings.example.org")


@pytest.mark.parametrize("origin", [*FOREIGN, *OTHER_PORTS, ELSEWHERE.replace("https", "http")])
def test_a_foreign_site_reads_nothing_by_a_visitors_login(proxied, origin):
    host = {"Host": NAME}
    mine = host | {"Cookie": cookie_of(proxied.url, host)}
    assert httpx.get(f"{proxied.url}gradio_api/token", headers=mine).json()["user"] == "ann"
    for path in PATHS:
        answer = httpx.get(f"{proxied.url}{path}", headers=mine | {"Origin": origin})
        assert answer.status_code == 403 and "ann" not in answer.text, path
        assert not [name for name in answer.headers if name.startswith("access-control-")]
    assert httpx.get(f"{proxied.url}gradio_api/token", headers=mine).json()["user"] == "ann"


def test_no_foreign_site_shows_the_page_in_a_frame(proxied):
    for path in ("", "login", "nothing"):
        assert httpx.get(f"{proxied.url}{path}", headers={"Host": NAME}).headers["content-security-policy"] == (
            "frame-ancestors 'self'"
        )


def test_a_foreign_site_is_refused_before_it_asks(proxied):
    asked = {"Host": NAME, "Access-Control-Request-Method": "POST"} | EVIL
    answer = httpx.options(f"{proxied.url}gradio_api/queue/join", headers=asked)
    assert answer.status_code == 403 and "access-control-allow-origin" not in answer.headers


def test_plain_http_of_a_name_that_is_allowed_by_https_is_another_site(proxied):
    host = ELSEWHERE.removeprefix("https://")
    for scheme, status in (("http", 403), ("https", 200)):
        headers = {"Host": host, "Origin": f"{scheme}://{host}"}
        assert httpx.get(f"{proxied.url}gradio_api/token", headers=headers).status_code == status


@pytest.mark.parametrize("origin", [f"https://{NAME}", f"http://{NAME}", ELSEWHERE])
@pytest.mark.parametrize("host", [NAME, f"{NAME}:443", "127.0.0.1:7860"])
def test_the_page_behind_a_proxy_may_ask_itself(proxied, host, origin):
    """Whatever name and port the proxy passes on."""
    mine = {"Host": host, "Origin": origin}
    mine["Cookie"] = cookie_of(proxied.url, mine)
    assert httpx.get(f"{proxied.url}gradio_api/token", headers=mine).json()["user"] == "ann"


def test_a_login_is_not_sent_along_with_another_sites_requests(proxied):
    answer = httpx.post(f"{proxied.url}login", data=LOGIN, headers={"Host": NAME})
    cookies = [line.lower() for line in answer.headers.get_list("set-cookie")]
    assert len(cookies) == 2
    assert all("samesite=lax" in line and "samesite=none" not in line and "httponly" in line for line in cookies)


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
@pytest.mark.parametrize("path", ["logout", "logout/"])
def test_another_sites_picture_or_link_logs_nobody_out(proxied, site, path):
    """Such a request tells no origin."""
    mine = {"Host": NAME, "Cookie": cookie_of(proxied.url, {"Host": NAME})}
    answer = httpx.get(f"{proxied.url}{path}", headers=mine | {"Sec-Fetch-Site": site})
    assert answer.status_code in (403, 404)
    assert httpx.get(f"{proxied.url}gradio_api/token", headers=mine).json()["user"] == "ann"
    assert httpx.get(f"{proxied.url}logout", headers=mine | {"Sec-Fetch-Site": "same-origin"}).status_code == 302
    assert httpx.get(f"{proxied.url}gradio_api/token", headers=mine).json()["user"] is None


def test_another_program_of_this_machine_is_another_site(served):
    port = served.url.rstrip("/").rpartition(":")[2]
    for origin in ("http://localhost:9999", "http://127.0.0.1:9999", "http://127.0.0.1", f"http://localhost:{port}"):
        answer = httpx.post(f"{served.url}gradio_api/call/adapters", json={"data": []}, headers={"Origin": origin})
        assert answer.status_code == 403, origin
    own = {"Origin": f"http://127.0.0.1:{port}"}
    assert httpx.post(f"{served.url}gradio_api/call/adapters", json={"data": []}, headers=own).status_code == 200


def test_a_public_page_takes_nothing_that_another_site_sends(public):
    own = {"Origin": public.url.rstrip("/")}
    login = {"Cookie": cookie_of(public.url, own)}
    assert "access-token" in login["Cookie"]
    calls = {
        "login": {"data": LOGIN},
        "gradio_api/upload": {"files": {"files": ("a.png", b"x")}},
        "gradio_api/call/adapters": {"json": {"data": []}},
        "gradio_api/run/stop": {"json": {"data": []}},
    }
    for path, content in calls.items():
        assert httpx.post(f"{public.url}{path}", headers=login | EVIL, **content).status_code == 403, path
        assert httpx.post(f"{public.url}{path}", headers=login | own, **content).status_code == 200, path
    for path in PATHS:
        assert httpx.get(f"{public.url}{path}", headers=login | EVIL).status_code == 403, path


def test_a_public_page_answers_to_any_name_that_is_also_the_origin(public):
    for host, origin in (("example.org", "https://example.org"), ("example.org:80", "http://example.org")):
        assert httpx.get(public.url, headers={"Host": host, "Origin": origin}).status_code == 200
    assert httpx.get(public.url, headers={"Host": "example.org", "Origin": "https://example.org:1"}).status_code == 403
    forwarded = {"X-Forwarded-Host": "example.org", "Origin": "https://example.org"}
    assert httpx.get(public.url, headers=forwarded).status_code == 200
    assert Client(public.url, auth=("ann", "secret"), verbose=False).predict(api_name="/adapters")


def test_a_forwarded_name_is_believed_only_when_it_is_allowed(proxied, served):
    evil, mine = {"X-Forwarded-Host": "evil.example"}, {"X-Forwarded-Host": NAME, "Host": NAME}
    assert "evil.example" not in httpx.get(f"{served.url}gradio_api/info?all_endpoints=", headers=evil).text
    for path in ("config", "gradio_api/info?all_endpoints=", ""):
        assert "evil.example" not in httpx.get(f"{served.url}{path}", headers=evil).text, path
    login = {"Cookie": cookie_of(proxied.url, mine)}
    assert httpx.get(f"{proxied.url}config", headers=mine | login).json()["root"].endswith(f"//{NAME}")
    for odd in ("evil.example:port", "[", ""):
        assert httpx.get(f"{served.url}config", headers={"X-Forwarded-Host": odd}).status_code == 200


def test_a_part_of_a_file_comes_without_the_visitors_cookie(served):
    mine = {"Cookie": "moslora_visitor=secret", "Range": "bytes=0-1"}
    path = httpx.post(f"{served.url}gradio_api/upload", files={"files": ("a.png", b"abc")}, headers=mine).json()[0]
    answer = httpx.get(f"{served.url}gradio_api/file={path}", headers=mine)
    assert (answer.status_code, answer.content) == (206, b"ab")
    assert "secret" not in str(answer.headers) and "host" not in answer.headers and "range" not in answer.headers
