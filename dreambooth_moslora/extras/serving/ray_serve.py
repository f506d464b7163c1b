"""Service on Ray Serve: one front, and replicas that hold the base.

No other module imports Ray Serve.

Ray reads its environment when imported: import this module after
`extras.cluster.ray_fleet.connected`.
"""

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from ray import serve
from ray.exceptions import RayActorError, RayError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from dreambooth_moslora.errors import UserError, format_error
from dreambooth_moslora.extras.serving.catalogue import ImageOrder, RefusedError, open_catalogue
from dreambooth_moslora.extras.serving.front import Access, Front, ServeSettings, build_front

APP_NAME = "dreambooth_moslora"
"""Ray Serve's name of the service."""
LOST_ERRORS = (BackPressureError, DeploymentUnavailableError, RayActorError)
"""Errors after which the client may ask again."""
QUIET_LOGGING = {"enable_access_log": False, "log_level": "WARNING"}
"""No access log: it would record prompts and addresses of clients."""
STOP_SEC = 5.0
"""Seconds for pictures in progress when the service ends."""


def keep_on_loopback() -> None:
    """Open this replica's ports on the loopback only: Ray Serve opens them without a token."""
    from grpc.aio._server import Server

    add_port = Server.add_insecure_port
    Server.add_insecure_port = lambda self, address: add_port(
        self, address.replace("[::]", "127.0.0.1")
    )


def build_replica_class(settings: ServeSettings, *, alone: bool) -> type:
    """Build the class of the replicas. It is made here because the decorator of `load` needs a
    number from the settings."""

    class Replica:
        """Base on one device. The router sends orders to a replica that has their adapter, while it
        has room."""

        def __init__(self) -> None:
            import torch

            # before Ray Serve opens the replica's ports
            if alone:
                keep_on_loopback()
            from dreambooth_moslora.extras.serving.drawer import ImageWorker
            from dreambooth_moslora.generation.pipeline import SubjectPipeline

            torch.set_num_threads(settings.threads)
            pipeline = SubjectPipeline.from_base(settings.pretrained_model_name_or_path)
            pipeline.resident_adapters = settings.resident_adapters
            self.drawer = ImageWorker(
                pipeline,
                batch=settings.batch,
                load=self.load,
            )

        @serve.multiplexed(max_num_models_per_replica=settings.resident_adapters)
        async def load(self, key: str) -> str:
            return await self.drawer.load_now(key)

        async def draw(self, order: ImageOrder) -> bytes | UserError:
            """Return a refusal instead of raising it: Ray would wrap a raised error and log a
            traceback."""
            try:
                return await self.drawer.draw(order)
            except UserError as error:
                return error

        async def facts(self) -> dict[str, Any]:
            pipeline = self.drawer.pipeline
            return {"base": pipeline.base_name, "resolution_px": pipeline.resolution_px}

    return Replica


def build_application(settings: ServeSettings, *, alone: bool = False) -> serve.Application:
    """Build the front, only one as it counts the requests, and its replicas; `alone`: all on this
    machine."""
    # a replica takes its share of the requests, and at least a batch while it draws another
    share = {"num_gpus": 1 / settings.per_gpu} if settings.per_gpu else {"num_gpus": 0}
    waiting = max(2 * settings.batch, -(-settings.max_waiting // settings.replicas))
    common = {
        "logging_config": QUIET_LOGGING,
        "graceful_shutdown_wait_loop_s": 0.5,
        "graceful_shutdown_timeout_s": STOP_SEC,
    }
    replica = serve.deployment(
        build_replica_class(settings, alone=alone),
        name="Replica",
        num_replicas=settings.replicas,
        ray_actor_options={"num_cpus": 0, **share},
        max_ongoing_requests=waiting,
        **common,
    )

    def build_front_app() -> Any:
        if alone:
            keep_on_loopback()
        handle = serve.get_deployment_handle("Replica", APP_NAME)
        access = Access(settings.tokens)
        catalogue = open_catalogue(settings.adapters)
        return build_front(
            Front(
                draw=partial(generate_on_replica, handle),
                facts=handle.facts.remote,
                catalogue=catalogue,
                access=access,
                max_inside=settings.max_waiting,
                request_timeout_sec=settings.request_timeout,
            )
        )

    # it refuses by itself what is too much, so Ray Serve must let more through
    front = serve.deployment(
        serve.ingress(build_front_app)(),
        name="Front",
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=2 * settings.max_waiting + 64,
        **common,
    )
    return front.bind(replica.bind())


async def generate_on_replica(handle: Any, order: ImageOrder) -> bytes:
    """Draw on the replica that Ray Serve chooses. A cancelled order is cancelled there, too. Raises
    UserError."""
    key = order.adapters[0].key if order.adapters else ""
    response = handle.options(multiplexed_model_id=key).draw.remote(order)
    try:
        result = await response
    except asyncio.CancelledError:
        response.cancel()
        raise
    except LOST_ERRORS as error:
        raise RefusedError(503, "a replica was lost; ask again", 5) from error
    if isinstance(result, UserError):
        raise result
    return result


@contextmanager
def serve_until_exit(settings: ServeSettings, *, alone: bool) -> Iterator[None]:
    """Serve for the length of the block. `alone` uses a Ray of this machine only; other machines
    reach it only through `settings.host`. Raises UserError when it cannot start."""
    # Ray Serve tells of each step of its start
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    address = {"host": settings.host, "port": settings.port}
    try:
        try:
            serve.start(http_options=address, logging_config=QUIET_LOGGING)
            serve.run(
                build_application(settings, alone=alone),
                name=APP_NAME,
                route_prefix="/",
                logging_config=QUIET_LOGGING,
            )
        except (RuntimeError, TimeoutError, RayError) as error:
            raise UserError(f"the service cannot start: {format_error(error)}.") from error
        yield
    finally:
        serve.shutdown()


def build(values: dict[str, Any]) -> serve.Application:
    """For a Serve config file: `dreambooth_moslora.extras.serving.ray_serve:build`, with the
    settings as `args:`."""
    return build_application(ServeSettings.from_dict(values))
