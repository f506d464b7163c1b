"""The page's pipeline that a service draws for: the same files, one clear line when the service is away."""

import asyncio
import socket
import threading
from types import SimpleNamespace

import pytest
import uvicorn

from dreambooth_moslora.core import UserError
from dreambooth_moslora.extras.serving.catalogue import open_catalogue
from dreambooth_moslora.extras.serving.drawer import Drawer
from dreambooth_moslora.extras.serving.front import Access, Front, build_front
from dreambooth_moslora.generation.grids import generate_grid, parse_axis
from dreambooth_moslora.generation.params import GenerationParams
from dreambooth_moslora.generation.pipeline import SubjectPipeline
from dreambooth_moslora.generation.remote import RemotePipeline, Service
from dreambooth_moslora.ui.generate_form import GenerateForm, compare, make_pictures
from tests.helpers.tiny_adapters import save_diffusers_lora

TOKEN = "correct-horse-battery"


@pytest.fixture(scope="module")
def base(tiny_base) -> SubjectPipeline:
    return SubjectPipeline.from_base(tiny_base)


@pytest.fixture(scope="module")
def place(base, tmp_path_factory):
    """The service without Ray on a port of the loopback: its address and the folder of its adapters."""
    shelf = tmp_path_factory.mktemp("shelf")
    save_diffusers_lora(base.pipeline.unet, shelf / "made", seed=1).rename(shelf / "dog.safetensors")
    catalogue = open_catalogue([str(shelf)])
    drawer = Drawer(base, catalogue)

    async def facts() -> dict:
        return {"base": base.base_name, "resolution_px": base.resolution_px}

    front = Front(drawer.draw, facts, catalogue, Access([TOKEN]), 8, 60.0)
    server = uvicorn.Server(uvicorn.Config(build_front(front), port=0, log_level="error"))
    sock = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([sock])))
    thread.start()
    yield SimpleNamespace(url=f"http://127.0.0.1:{sock.getsockname()[1]}", shelf=shelf)
    server.should_exit = True
    thread.join()


@pytest.fixture
def remote(place, base) -> RemotePipeline:
    pipeline = RemotePipeline(Service(place.url, TOKEN), base.base_name)
    pipeline.load_adapter(place.shelf / "dog.safetensors", "dog")
    return pipeline


def params(**values) -> GenerationParams:
    given = {"seed": 1, "steps": 1, "guidance_scale": 2.0, "adapters": (("dog", 1.0),)} | values
    return GenerationParams("a photo of a dog", **given)


@pytest.mark.extra("prometheus_client")
def test_remote_pictures_are_the_files_of_the_pipeline_here(remote, base, place):
    base.load_adapter(place.shelf / "dog.safetensors")
    asked = params(num_images=2)
    images = [event for event in remote.generate(asked) if hasattr(event, "save")]
    assert [image.png() for image in images] == [image.png() for image in base.draw(asked)]
    *_, sheet = generate_grid(remote, params(), (parse_axis("seed=1,2"),), load=lambda cell: cell)
    assert sheet.provenance.adapter_sha256[0][0] == "dog"
    assert list(remote.generate(params(), lambda: True)) == []


@pytest.mark.extra("prometheus_client")
def test_another_file_of_the_same_name_is_refused_and_an_unknown_name_too(remote, base, tmp_path):
    other = save_diffusers_lora(base.pipeline.unet, tmp_path, seed=5)
    with pytest.raises(UserError, match="has no adapter 'cat'"):
        remote.load_adapter(other, "cat")
    remote.load_adapter(other, "dog")
    with pytest.raises(UserError, match="another file"):
        list(remote.generate(params()))


@pytest.mark.extra("prometheus_client")
def test_a_wrong_token_another_base_and_another_program_are_told(place, base):
    with pytest.raises(UserError, match="token"):
        RemotePipeline(Service(place.url), base.base_name).load_adapter(place.shelf / "dog.safetensors")
    with pytest.raises(UserError, match="base"):
        RemotePipeline(Service(place.url, TOKEN), "another")
    with pytest.raises(UserError, match="not answered"):
        RemotePipeline(Service(f"{place.url}/below", TOKEN), base.base_name)


@pytest.mark.parametrize(
    "url",
    [
        "ftp://x",
        "http://",
        "http://x:port",
        "//",
        "http://[::1",
        "http://a..b",
        "http://a/\u00fc",
        "http://" + "a" * 300,
    ],
)
def test_what_is_no_address_is_a_persons_mistake(url):
    with pytest.raises(UserError, match="--backend"):
        Service(url)


@pytest.mark.parametrize("token", ["a\nX: y", "\u043a\u043b\u044e\u0447"])
def test_a_token_that_no_header_can_hold_is_a_persons_mistake(token):
    with pytest.raises(UserError, match="--backend_token"):
        Service("http://127.0.0.1", token)


@pytest.mark.parametrize("size", ["x", [1], float("inf"), True])
def test_a_size_that_is_none_is_told(monkeypatch, size):
    service = Service("http://127.0.0.1")
    monkeypatch.setattr(service, "get", lambda path: {"base": "tiny", "resolution_px": size})
    with pytest.raises(UserError, match="not a service"):
        RemotePipeline(service, "tiny")


def test_a_list_of_adapters_that_is_none_is_told(monkeypatch, tmp_path):
    service = Service("http://127.0.0.1")
    monkeypatch.setattr(service, "get", lambda path: {"base": "tiny", "resolution_px": 64, "adapters": 5})
    (tmp_path / "dog.safetensors").write_bytes(b"dog")
    with pytest.raises(UserError, match="has no adapter 'dog'"):
        RemotePipeline(service, "tiny").load_adapter(tmp_path / "dog.safetensors", "dog")


def test_a_backend_that_is_away_is_one_line_without_the_token(free_port):
    with pytest.raises(UserError, match="cannot be reached") as error:
        RemotePipeline(Service(f"http://127.0.0.1:{free_port}", TOKEN), "tiny")
    assert "\n" not in str(error.value) and TOKEN not in str(error.value)


@pytest.mark.extra("prometheus_client")
def test_the_page_generates_and_compares_by_the_backend_and_says_when_it_is_away(place, base, tmp_path, free_port):
    from dreambooth_moslora.ui.app import context_of

    request = SimpleNamespace(session_hash="s", username=None, headers={}, cookies={}, request=None, client=None)
    options = {"base": str(base.base_name), "adapters_dir": str(place.shelf), "runs_dir": str(tmp_path / "runs")}
    form = GenerateForm(prompt="a dog", adapter="dog", seed=1, steps=1, guidance_scale=2.0, size="64 x 64")

    def context(url: str):
        return context_of(SimpleNamespace(**options, backend=url, backend_token=TOKEN), training=False)

    ctx = context(place.url)
    try:
        *_, frame = make_pictures(ctx, form, request)
        assert GenerationParams.from_png(frame.pictures[0].path).adapters == (("dog", 1.0),)
        *_, frame = compare(ctx, form, request)
        assert len(frame.pictures) == 2
    finally:
        ctx.visitors.close()
    ctx = context(f"http://127.0.0.1:{free_port}")
    try:
        with pytest.raises(UserError, match="cannot be reached"):
            list(make_pictures(ctx, form, request))
    finally:
        ctx.visitors.close()
