"""`python -m dreambooth_moslora serve --adapters DIR`: pictures over HTTP, drawn by replicas on Ray
Serve."""

import argparse
import os
import signal
import socket
import sys
import threading
import time
from dataclasses import replace
from importlib.util import find_spec

from dreambooth_moslora.base.base import Base
from dreambooth_moslora.disk.paths import find_asset
from dreambooth_moslora.errors import UserError, one_line
from dreambooth_moslora.extras.serving.client import TOKEN_VARIABLE
from dreambooth_moslora.extras.serving.front import PATIENCE, ServeSettings, tokens_of

EPILOG = """example:
  serve --adapters runs/pets --replicas 2
  curl http://127.0.0.1:8000/generate -H 'Content-Type: application/json' \\
      -d '{"prompt": "a photo of sks dog", "adapter": "rex", "seed": 1}' -o rex.png"""
INSTALL = 'pip install "ray[serve]>=2.60,<3"'
NEEDED = ("ray", "grpc_reflection", "prometheus_client")
"""Modules: `ray[default]` includes Ray Serve's code but not all of its dependencies."""
FIELDS = ServeSettings.__dataclass_fields__


def serve_arguments(parser: argparse.ArgumentParser) -> None:
    def number(name: str, about: str) -> None:
        default = FIELDS[name].default
        parser.add_argument(
            f"--{name}",
            metavar="N",
            type=int,
            default=default,
            help=f"{about} (default: {default})",
        )

    parser.epilog = EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    about = "folders of adapters and runs, or one bucket (s3://…, gs://…)"
    parser.add_argument("--adapters", metavar="DIR", nargs="+", required=True, help=about)
    about = "the base: a folder, a hub id, a .safetensors file, or toy (default)"
    parser.add_argument(
        "--pretrained_model_name_or_path", metavar="BASE", default="toy", help=about
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: this machine only)"
    )
    number("port", "port to listen on")
    number("replicas", "processes that hold the base and draw")
    about = (
        f"a token that clients must send; repeatable; {TOKEN_VARIABLE} in the environment adds one"
    )
    parser.add_argument("--token", action="append", help=about)
    number("max_waiting", "requests that may wait or be drawn at once; more get 503")
    number("request_timeout", "seconds until a request gets 504")
    number("batch", "requests for the same adapter and size that are drawn in a row")
    number("resident_adapters", "adapters that a replica keeps in the model")
    about = "threads of a replica on the CPU (default: as `generate`; other numbers change the last bits)"
    parser.add_argument("--threads", metavar="N", type=int, help=about)
    parser.add_argument("--per_gpu", metavar="N", type=int, help="replicas on one GPU (default: 1)")
    about = 'the Ray cluster: "auto" or HOST:PORT (default: this machine alone)'
    parser.add_argument("--ray_address", metavar="ADDRESS", help=about)


def run_serve(args: argparse.Namespace) -> int:
    for place in args.adapters:
        if "://" not in place and not os.path.isdir(find_asset(place)):
            raise UserError(f"--adapters {place}: there is no such folder.")
    Base.find(args.pretrained_model_name_or_path)
    settings = settings_of(args)
    from dreambooth_moslora.extras.cluster.ray_fleet import connected, has_gpus
    from dreambooth_moslora.extras.serving.catalogue import open_catalogue

    count = len(open_catalogue(settings.adapters).names())
    if args.ray_address is None:  # Ray would only say that its proxy died
        family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
        try:
            socket.create_server((settings.host, settings.port), family=family).close()
        except OSError as error:
            where = f"--host {settings.host} --port {settings.port}"
            raise UserError(f"{where}: cannot be listened on: {one_line(error)}.") from error
    if not all(map(find_spec, NEEDED)):
        raise UserError(f"serve needs Ray Serve: {INSTALL}.")
    line = f"{count} adapters; loading {settings.pretrained_model_name_or_path}, {settings.replicas} times …"
    print(line, file=sys.stderr, flush=True)
    started = time.monotonic()
    os.environ.update(PATIENCE | os.environ)
    with connected(args.ray_address):
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        from dreambooth_moslora.extras.serving.ray_serve import listening

        per_gpu = (settings.per_gpu or 1) if has_gpus() else None
        with listening(replace(settings, per_gpu=per_gpu), alone=args.ray_address is None):
            host = f"[{settings.host}]" if ":" in settings.host else settings.host
            line = f"ready after {time.monotonic() - started:.0f} s: http://{host}:{settings.port} (Ctrl-C ends it)"
            print(line, file=sys.stderr, flush=True)
            threading.Event().wait()
    return 0


def settings_of(args: argparse.Namespace) -> ServeSettings:
    values = {name: getattr(args, name) for name in FIELDS if hasattr(args, name)}
    if args.threads is None:
        import torch

        values["threads"] = torch.get_num_threads()
    return ServeSettings(
        **values | {"adapters": tuple(args.adapters), "tokens": tokens_of(args.token)}
    )
