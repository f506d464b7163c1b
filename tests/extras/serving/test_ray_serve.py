"""The service on Ray Serve for real: two replicas on this machine, and what becomes of one that is
killed."""

import time
from concurrent.futures import ThreadPoolExecutor
from ipaddress import ip_address

import httpx
import psutil
import pytest
import torch

from dreambooth_moslora.extras.serving.command_serve import REQUIRED_PACKAGES
from dreambooth_moslora.extras.serving.front import RAY_TIMEOUTS, ServeSettings
from dreambooth_moslora.generation.image_params import GenerationParams
from dreambooth_moslora.generation.pipeline import SubjectPipeline
from tests.extras.serving.conftest import NAMES, TOKEN
from tests.helpers.ports import find_free_port

pytestmark = [pytest.mark.slow, pytest.mark.extra(*REQUIRED_PACKAGES)]


@pytest.fixture(scope="module")
def service(shelf, tiny_base):
    """An httpx client of it, and the folder of its adapters."""
    from dreambooth_moslora.extras.cluster.ray_fleet import connect

    settings = ServeSettings(
        adapters=(str(shelf),),
        pretrained_model_name_or_path=str(tiny_base),
        port=find_free_port(),
        replicas=2,
        tokens=(TOKEN,),
        max_waiting=16,
        resident_adapters=2,
        threads=torch.get_num_threads(),
    )
    url, bearer = f"http://127.0.0.1:{settings.port}", {"Authorization": f"Bearer {TOKEN}"}
    with pytest.MonkeyPatch.context() as patch:
        # whatever the person has set
        for name, value in (RAY_TIMEOUTS | {"RAY_AUTH_MODE": "disabled"}).items():
            patch.setenv(name, value)
        with connect(None):
            from dreambooth_moslora.extras.serving.ray_serve import serve_until_exit

            client = httpx.Client(base_url=url, headers=bearer, timeout=120, trust_env=False)
            with serve_until_exit(settings, alone=True), client:
                yield client, shelf


def draw(client: httpx.Client, name: str, seed: int = 1, **values) -> httpx.Response:
    order = {
        "prompt": "a photo of a dog",
        "adapter": name,
        "seed": seed,
        "steps": 2,
        "guidance_scale": 2.0,
    }
    return client.post("/generate", json=order | values)


def expected(base: SubjectPipeline, shelf, name: str, seed: int = 1) -> bytes:
    adapters = ((base.load_adapter(shelf / f"{name}.safetensors"), 1.0),)
    (image,) = base.draw(GenerationParams("a photo of a dog", "", seed, 2, 2.0, adapters=adapters))
    return image.png()


def test_many_at_once_get_the_pictures_of_generate(service, base):
    client, shelf = service
    orders = [(name, seed) for seed in (1, 2, 3) for name in NAMES]
    with ThreadPoolExecutor(len(orders)) as clients:
        answers = list(clients.map(lambda pair: draw(client, *pair), orders))
    assert [answer.status_code for answer in answers] == [200] * len(orders)
    for pair, answer in zip(orders, answers):
        assert answer.content == expected(base, shelf, *pair)
    assert client.get("/healthz").json()["resolution_px"] == base.resolution_px


def test_nothing_listens_but_on_the_loopback(service):
    children = []
    for process in psutil.Process().children(recursive=True):
        children += [
            (c.laddr.ip, process.cmdline())
            for c in process.net_connections("inet")
            if c.status == "LISTEN"
        ]
    assert len([1 for _, cmdline in children if "Replica" in cmdline[0]]) >= 3, children
    assert all(
        ip_address(address.removeprefix("::ffff:")).is_loopback for address, _ in children
    ), children


def test_mistakes_strangers_and_a_full_queue_get_json(service):
    client, _ = service
    assert draw(client, "wolf").status_code == 404
    assert draw(client, "dog", prompt="").json() == {
        "error": "the prompt is empty; write what the image should show"
    }
    assert client.get("/adapters", headers={"Authorization": "Bearer x"}).status_code == 401
    with ThreadPoolExecutor(32) as clients:
        answers = list(clients.map(lambda seed: draw(client, "dog", seed, steps=20), range(32)))
    codes = {answer.status_code for answer in answers}
    assert codes == {200, 503} and all(
        "retry-after" in a.headers for a in answers if a.status_code == 503
    )


def test_a_replicas_own_port_takes_no_pickle_of_a_stranger(service):
    """On a cluster it is open on all addresses; on one machine on the loopback."""
    import grpc
    from ray.serve.generated import serve_pb2, serve_pb2_grpc

    connections = [
        connection
        for connection in psutil.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN and connection.pid
    ]
    ports = {
        connection.laddr.port
        for connection in connections
        if "Serve" in psutil.Process(connection.pid).name()
    }
    codes = set()
    for port in ports:
        with (
            grpc.insecure_channel(f"127.0.0.1:{port}") as channel,
            pytest.raises(grpc.RpcError) as error,
        ):
            request = serve_pb2.ASGIRequest(pickled_request_metadata=b"no pickle")
            serve_pb2_grpc.ASGIServiceStub(channel).HandleRequest(request, timeout=20)
        codes.add(error.value.code())
    assert grpc.StatusCode.UNAUTHENTICATED in codes


def test_a_replica_that_is_killed_loses_no_other_picture(service, base):
    client, shelf = service
    children = [(child, child.cmdline()) for child in psutil.Process().children(recursive=True)]
    replicas = [
        p
        for p, cmdline in children
        if ":Replica" in " ".join(cmdline) and "ray::ServeReplica" in cmdline[0]
    ]
    assert len(replicas) == 2
    orders = [(name, seed) for seed in (5, 6) for name in NAMES]
    with ThreadPoolExecutor(len(orders)) as clients:
        answers = [clients.submit(draw, client, *pair) for pair in orders]
        replicas[0].kill()
    for pair, answer in zip(orders, [answer.result() for answer in answers]):
        assert answer.status_code in (200, 503), answer.text
        deadline = time.monotonic() + 120
        while answer.status_code == 503 and time.monotonic() < deadline:
            time.sleep(1)
            answer = draw(client, *pair)
        assert answer.content == expected(base, shelf, *pair)
