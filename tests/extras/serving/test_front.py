"""The service without Ray, drawing for real: the same pictures as `generate`, limits, tokens and
counts."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from shutil import copytree
from unittest.mock import AsyncMock

import httpx
import pytest
from starlette.datastructures import URL

from dreambooth_moslora.errors import UserError
from dreambooth_moslora.extras.serving import catalogue as catalogue_module
from dreambooth_moslora.extras.serving import front as front_module
from dreambooth_moslora.extras.serving.drawer import ImageWorker
from dreambooth_moslora.extras.serving.front import Access, Front, ServeSettings, build_front
from dreambooth_moslora.generation.image_params import GenerationParams
from dreambooth_moslora.generation.pipeline import SubjectPipeline
from tests.extras.serving.conftest import NAMES, TOKEN, shop_of


@dataclass
class Shop:
    """A front and a drawer in this process."""

    front: Front
    drawer: ImageWorker

    def run(self, work: Callable[[httpx.AsyncClient], Awaitable], **headers: str):
        async def inside():
            transport = httpx.ASGITransport(build_front(self.front), raise_app_exceptions=False)
            async with httpx.AsyncClient(
                transport=transport, base_url="http://127.0.0.1", headers=headers
            ) as client:
                result = await work(client)
            if self.drawer._work is not None:
                await self.drawer._work
            return result

        return asyncio.run(inside())

    def get(self, path: str, **headers: str) -> httpx.Response:
        return self.run(lambda client: client.get(path), **headers)

    def post(
        self, content, kind: str | None = "application/json", length: bytes | None = None
    ) -> int:
        """The status of such a body, said to be of this length."""
        headers = {b"Content-Type": kind.encode()} if kind else {}
        headers |= {b"Content-Length": length} if length else {}
        return self.run(
            lambda client: client.post("/generate", content=content, headers=headers)
        ).status_code

    def ask(self, *orders: dict, **headers: str) -> list[httpx.Response]:
        async def all_at_once(client: httpx.AsyncClient) -> list[httpx.Response]:
            return await asyncio.gather(*(client.post("/generate", json=order) for order in orders))

        return self.run(all_at_once, **headers)


@pytest.fixture(scope="module")
def pipeline(tiny_base) -> SubjectPipeline:
    pipeline = SubjectPipeline.from_base(tiny_base)
    pipeline.resident_adapters = 2
    return pipeline


@pytest.fixture
def open_shop(pipeline, shelf, monkeypatch) -> Callable[..., Shop]:
    monkeypatch.setattr(catalogue_module, "MIN_LISTING_AGE_SEC", -1.0)
    return lambda folder=shelf, **options: Shop(*shop_of(pipeline, folder, **options))


@pytest.fixture
def shop(open_shop) -> Shop:
    return open_shop()


def order(name: str | None = "dog", **values) -> dict:
    return (
        {"prompt": "a photo of a dog", "seed": 1, "steps": 1, "guidance_scale": 2.0}
        | values
        | {"adapter": name}
    )


def of_generate(base: SubjectPipeline, shelf: Path, request: dict, target: Path) -> bytes:
    """The file that `generate` writes for the same recipe and adapter."""
    values = {key: value for key, value in request.items() if key not in ("adapter", "scale")}
    pairs = ()
    if request["adapter"]:
        name = base.load_adapter(shelf / f"{request['adapter']}.safetensors")
        pairs = ((name, request.get("scale", 1.0)),)
    (image,) = [
        e for e in base.generate(GenerationParams(**values, adapters=pairs)) if hasattr(e, "save")
    ]
    return image.save(target).read_bytes()


@pytest.mark.slow
def test_pictures_equal_those_of_generate_byte_for_byte(shop, base, shelf, tmp_path):
    orders = [order(name, seed=seed) for seed in (1, 2) for name in NAMES]
    orders += [order("dog", scale=0.5), order("dog", height_px=32, width_px=64), order(None)]
    answers = shop.ask(*orders)
    assert [answer.status_code for answer in answers] == [200] * len(orders)
    for expected_order, answer in zip(orders, answers):
        assert answer.content == of_generate(base, shelf, expected_order, tmp_path / "one.png")


def test_an_adapter_that_the_router_assumes_loaded_is_loaded(shop, base, shelf, tmp_path):
    """Ray Serve's cache does not see that the model has let go of an adapter for another."""

    shop.drawer._load = AsyncMock()
    for name in (*NAMES, "dog"):
        (answer,) = shop.ask(order(name))
        assert answer.content == of_generate(base, shelf, order(name), tmp_path / "one.png")


def test_a_changed_file_is_loaded_again_and_a_wrong_one_refused(open_shop, base, shelf, tmp_path):
    shelf = Path(copytree(shelf, tmp_path / "shelf"))
    shop = open_shop(shelf)
    (first,) = shop.ask(order())
    file = shelf / "dog.safetensors"
    old = base.load_adapter(file, "old") and base.adapters["old"].sha256
    file.write_bytes((shelf / "cat.safetensors").read_bytes())
    (second,) = shop.ask(order())
    assert (
        second.content == of_generate(base, shelf, order(), tmp_path / "one.png") != first.content
    )
    (third,) = shop.ask(order(adapter_sha256={"dog": old}))
    assert third.status_code == 409 and "another file" in third.json()["error"]
    file.write_bytes(b"half a file")
    (fourth,) = shop.ask(order())
    assert fourth.status_code == 400 and str(shelf) not in fourth.text
    assert shop.ask(order("cat"))[0].status_code == 200


def test_more_adapters_at_once_than_a_replica_keeps_are_refused(shop):
    several = [order(None, adapters=[[name, 1.0] for name in NAMES[:count]]) for count in (3, 2)]
    refused, accepted = shop.ask(*several)
    assert (refused.status_code, accepted.status_code) == (400, 200)
    assert (
        refused.json()["error"]
        == "this service draws with at most 2 adapters at once (--resident_adapters)"
    )


def test_a_mistake_is_one_line_of_json(shop):
    wrong = [
        order("wolf"),
        order(prompt=""),
        order(scheduler=[]),
        order(steps=0),
        order(height_px=512, width_px=512),
    ]
    answers = shop.ask(*wrong)
    assert [answer.status_code for answer in answers] == [404, 400, 400, 400, 400]
    assert all(
        list(answer.json()) == ["error"] and "\n" not in answer.json()["error"]
        for answer in answers
    )

    async def endless():
        for _ in range(64):
            yield b" " * 65536

    assert [shop.post(b"{}", None), shop.post(b" " * 70_000), shop.post(endless())] == [
        415,
        413,
        413,
    ]
    assert shop.post(b"{}", "application/json", length=b"\xb2") == 400, (
        "a digit to Python, and no number"
    )
    assert [shop.get(path).status_code for path in ("/generate", "/../etc/passwd")] == [405, 404]


def test_a_body_that_trickles_is_given_up(shop, monkeypatch):
    async def endless():
        for _ in range(20):
            yield b" "
            await asyncio.sleep(0.05)

    monkeypatch.setattr(front_module, "BODY_SEC", 0.05)
    assert shop.post(endless()) == 408 and shop.front.active_requests == 0


def test_more_than_may_wait_are_told_when_to_come_back(open_shop):
    shop = open_shop(max_inside=2)
    answers = shop.ask(*(order(seed=seed) for seed in range(5)))
    assert sorted(answer.status_code for answer in answers) == [200, 200, 503, 503, 503]
    assert all(int(a.headers["retry-after"]) >= 1 for a in answers if a.status_code == 503)
    assert shop.ask(order())[0].status_code == 200


def test_a_request_ends_at_its_time_limit(open_shop):
    shop = open_shop(request_timeout_sec=0.3)
    answers = shop.ask(order(steps=100), order("cat", steps=100), order("emu", steps=100))
    assert [answer.status_code for answer in answers] == [504] * 3
    assert len(shop.drawer.batches) == 0 and shop.front.active_requests == 0
    shop.front.request_timeout_sec = 60.0
    assert shop.ask(order())[0].status_code == 200


def test_a_token_opens_everything_but_health_which_is_open(open_shop):
    shop = open_shop(access=Access(["another-long-token", TOKEN]))
    bearer = {"Authorization": f"Bearer {TOKEN}", "Host": "pictures.example.org"}
    for wrong in (None, f"Basic {TOKEN}", f"Bearer {TOKEN}x"):
        answer = shop.get("/adapters", **({"Authorization": wrong} if wrong else {}))
        assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
    assert shop.get("/adapters", **bearer).status_code == 200
    assert shop.get("/adapters/", Host="evil.example").status_code == 404
    assert shop.get("/healthz").json() == {
        "status": "ok",
        "base": shop.drawer.pipeline.base_name,
        "resolution_px": 64,
    }
    assert shop.ask(order())[0].status_code == 401
    assert shop.ask(order("wolf"), **bearer)[0].status_code == 404


@pytest.mark.parametrize("host", ["x/healthz?", "x/healthz#", "x@y/healthz?"])
def test_no_host_header_is_taken_for_the_open_path(host, open_shop, monkeypatch):
    """Starlette 0.46 puts it before the path in `request.url`, and so all paths were open."""
    url = property(lambda self: URL(f"http://{self.headers['host']}{self.scope['path']}"))
    monkeypatch.setattr("starlette.requests.HTTPConnection.url", url)
    shop = open_shop(access=Access([TOKEN]))
    assert shop.get("/adapters", Host=host).status_code == 401


def test_without_a_token_no_web_page_is_answered(shop):
    assert shop.get("/adapters").json() == {"adapters": sorted(NAMES)}
    assert shop.get("/adapters", Host="evil.example").status_code == 421
    assert shop.get("/adapters", Host="localhost:8000").status_code == 200
    assert shop.ask(order(), Origin="http://evil.example")[0].status_code == 403


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"host": "0.0.0.0"}, "--token"),
        ({"tokens": ("short",)}, "token"),
        ({"tokens": ("a token of many words",)}, "token"),
        ({"port": 0}, "--port"),
        ({"replicas": 0}, "--replicas"),
        ({"max_waiting": True}, "--max_waiting"),
        ({"adapters": ()}, "--adapters"),
    ],
)
def test_settings_that_cannot_be_are_a_persons_mistake(values, word):
    with pytest.raises(UserError, match=word):
        ServeSettings(**{"adapters": ("x",)} | values)


def test_a_config_file_takes_its_token_from_the_environment(monkeypatch):
    with pytest.raises(UserError, match="token"):
        ServeSettings.from_dict({"adapters": "x"})
    monkeypatch.setenv("DREAMBOOTH_TOKEN", TOKEN)
    assert ServeSettings.from_dict({"adapters": "x"}).tokens == (TOKEN,)
    with pytest.raises(UserError, match="colour"):
        ServeSettings.from_dict({"adapters": "x", "colour": 1})
