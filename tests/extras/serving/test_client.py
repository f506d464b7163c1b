"""The page's pipeline that a service draws for: the same files, one clear line when the service is
away."""

import argparse
import asyncio
import socket
import threading
from contextlib import closing, contextmanager
from types import SimpleNamespace

import pytest
import uvicorn

from dreambooth_moslora.errors import UserError
from dreambooth_moslora.extras.serving.client import RemotePipeline, Service
from dreambooth_moslora.extras.serving.command_page import page_arguments, service_of
from dreambooth_moslora.extras.serving.front import Access, build_front
from dreambooth_moslora.generation.grids import generate_grid, parse_axis
from dreambooth_moslora.generation.params import GenerationParams
from dreambooth_moslora.ui.app import context_of
from dreambooth_moslora.ui.drawing import compare, make_pictures
from dreambooth_moslora.ui.generate_values import GenerateForm
from tests.extras.serving.conftest import TOKEN, shop_of
from tests.helpers.tiny_adapters import save_diffusers_lora


@pytest.fixture(scope="module")
def place(base, shelf):
    """The service without Ray on a port of the loopback: its address and the folder of its
    adapters."""
    front, _ = shop_of(base, shelf, access=Access([TOKEN]))
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


def test_remote_pictures_are_the_files_of_the_pipeline_here(remote, base, place):
    base.load_adapter(place.shelf / "dog.safetensors")
    asked = params(num_images=2)
    images = [event for event in remote.generate(asked) if hasattr(event, "save")]
    assert [image.png() for image in images] == [image.png() for image in base.draw(asked)]
    *_, sheet = generate_grid(remote, params(), (parse_axis("seed=1,2"),), load=lambda cell: cell)
    assert sheet.provenance.adapter_sha256[0][0] == "dog"
    assert list(remote.generate(params(), lambda: True)) == []


def test_a_wrong_token_another_base_program_or_file_and_an_unknown_name_are_told(
    place, remote, base, tmp_path
):
    other = save_diffusers_lora(base.pipeline.unet, tmp_path, seed=5)
    remote.load_adapter(other, "dog")
    mine = Service(place.url, TOKEN)
    for ask, says in (
        (
            lambda: RemotePipeline(Service(place.url), base.base_name).load_adapter(other, "dog"),
            "token",
        ),
        (lambda: RemotePipeline(mine, "another"), "base"),
        (
            lambda: RemotePipeline(Service(f"{place.url}/below", TOKEN), base.base_name),
            "not answered",
        ),
        (lambda: remote.load_adapter(other, "cow"), "has no adapter 'cow'"),
        (lambda: list(remote.generate(params())), "another file"),
    ):
        with pytest.raises(UserError, match=says):
            ask()


def test_what_is_no_address_is_a_persons_mistake():
    for url in ("ftp://x", "http://", "http://x:port"):
        with pytest.raises(UserError, match="--backend "):
            Service(url)


def test_a_backend_that_is_away_is_one_line_without_the_token(free_port):
    with pytest.raises(UserError, match="cannot be reached") as error:
        RemotePipeline(Service(f"http://127.0.0.1:{free_port}", TOKEN), "tiny")
    assert "\n" not in str(error.value) and TOKEN not in str(error.value)


def test_the_page_generates_and_compares_by_the_backend_and_says_when_it_is_away(
    place, tiny_base, tmp_path, free_port
):
    request = SimpleNamespace(session_hash="s")
    page_arguments(parser := argparse.ArgumentParser())
    words = [
        "--base",
        str(tiny_base),
        "--adapters_dir",
        str(place.shelf),
        "--runs_dir",
        str(tmp_path / "runs"),
    ]
    form = GenerateForm(
        prompt="a dog", adapter="dog", seed=1, steps=1, guidance_scale=2.0, size="64 x 64"
    )

    @contextmanager
    def page_of(url: str):
        args = parser.parse_args([*words, "--backend", url, "--backend_token", TOKEN])
        ctx = context_of(args, service_of(args))
        with closing(ctx.workspace):
            yield ctx

    with page_of(place.url) as ctx:
        *_, frame = make_pictures(ctx, form, request)
        assert ctx.chosen.is_remote and GenerationParams.from_png(
            frame.pictures[0].path
        ).adapters == (("dog", 1.0),)
        *_, frame = compare(ctx, form, request)
        assert len(frame.pictures) == 2
    with (
        page_of(f"http://127.0.0.1:{free_port}") as ctx,
        pytest.raises(UserError, match="cannot be reached"),
    ):
        list(make_pictures(ctx, form, request))
