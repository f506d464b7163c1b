"""`python -m dreambooth_moslora serve --adapters DIR`: pictures over HTTP.

They are drawn by replicas on Ray Serve.
"""

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
from dreambooth_moslora.cli.terminal import print_loading
from dreambooth_moslora.errors import UserError, format_error
from dreambooth_moslora.extras.cluster.ray_fleet import connect, has_gpus
from dreambooth_moslora.extras.serving.catalogue import open_catalogue
from dreambooth_moslora.extras.serving.front import (
    RAY_TIMEOUTS,
    TOKEN_VARIABLE,
    ServeSettings,
    collect_tokens,
)
from dreambooth_moslora.settings.setting_names import list_flags

BASE_SETTING = "pretrained_model_name_or_path"
EPILOG = """example:
  serve --adapters runs/pets --replicas 2
  curl http://127.0.0.1:8000/generate -H 'Content-Type: application/json' \\
      -d '{"prompt": "a photo of sks dog", "adapter": "rex", "seed": 1}' -o rex.png"""
INSTALL = 'pip install "ray[serve]>=2.60,<3"'
"""How a person gets what is needed."""
REQUIRED_PACKAGES = ("ray", "grpc_reflection")
"""Modules: `ray[default]` includes Ray Serve's code but not all of its dependencies."""
FIELDS = ServeSettings.__dataclass_fields__
"""Most flags have the names of settings."""


def serve_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `serve`."""

    def add_number(name: str, help_text: str) -> None:
        default = FIELDS[name].default
        help_text = f"{help_text} (default: {default})"
        parser.add_argument(f"--{name}", metavar="N", type=int, default=default, help=help_text)

    parser.epilog = EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter

    # what is drawn, and who may ask
    help_text = "folders of adapters and runs"
    parser.add_argument("--adapters", metavar="DIR", nargs="+", required=True, help=help_text)
    help_text = "the base: a folder, a hub id, a .safetensors file, or toy (default)"
    parser.add_argument(
        *list_flags(BASE_SETTING), dest=BASE_SETTING, metavar="BASE", default="toy", help=help_text
    )
    help_text = "address to listen on (default: this machine only)"
    parser.add_argument("--host", default="127.0.0.1", help=help_text)
    add_number("port", "port to listen on")
    add_number("replicas", "processes that hold the base and draw")
    help_text = (
        f"a token that clients must send; repeatable; {TOKEN_VARIABLE} in the environment adds one"
    )
    parser.add_argument("--token", action="append", help=help_text)

    # how much at once, and for how long
    add_number("max_waiting", "requests that may wait or be drawn at once; more get 503")
    add_number("request_timeout", "seconds until a request gets 504")
    add_number("batch", "requests for the same adapter and size that are drawn in a row")
    add_number("resident_adapters", "adapters that a replica keeps in the model")

    # the machines
    help_text = (
        "threads of a replica on the CPU "
        "(default: as `generate`; other numbers change the last bits)"
    )
    parser.add_argument("--threads", metavar="N", type=int, help=help_text)
    parser.add_argument("--per_gpu", metavar="N", type=int, help="replicas on one GPU (default: 1)")
    help_text = 'the Ray cluster: "auto" or HOST:PORT (default: this machine alone)'
    parser.add_argument("--ray_address", metavar="ADDRESS", help=help_text)


def run_serve(args: argparse.Namespace) -> int:
    """Serve until the process is ended. Raises UserError for all that can be seen to be wrong
    before Ray is started."""
    count = len(open_catalogue(args.adapters).list_names())
    Base.find(args.pretrained_model_name_or_path)
    settings = build_settings(args)

    # try the port here, as Ray would only say that its proxy died
    if args.ray_address is None:
        family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
        try:
            socket.create_server((settings.host, settings.port), family=family).close()
        except OSError as error:
            where = f"--host {settings.host} --port {settings.port}"
            raise UserError(f"{where}: cannot be listened on: {format_error(error)}.") from error
    if not all(map(find_spec, REQUIRED_PACKAGES)):
        raise UserError(f"serve needs Ray Serve: {INSTALL}.")

    # Ray reads its environment when it is imported, which `connected` does
    base = settings.pretrained_model_name_or_path
    line = f"{count} adapters; loading {base}, {settings.replicas} times …"
    print(line, file=sys.stderr, flush=True)
    started = time.monotonic()
    os.environ.update(RAY_TIMEOUTS | os.environ)
    with connect(args.ray_address):
        # a service manager ends it by this signal: leave the blocks, so that Ray ends too
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        from dreambooth_moslora.extras.serving.ray_serve import serve_until_exit

        per_gpu = (settings.per_gpu or 1) if has_gpus() else None
        with serve_until_exit(replace(settings, per_gpu=per_gpu), alone=args.ray_address is None):
            host = f"[{settings.host}]" if ":" in settings.host else settings.host
            url = f"http://{host}:{settings.port}"
            line = f"ready after {time.monotonic() - started:.0f} s: {url} (Ctrl-C ends it)"
            print(line, file=sys.stderr, flush=True)
            threading.Event().wait()
    return 0


def build_settings(args: argparse.Namespace) -> ServeSettings:
    """Build the settings from the flags. Raises UserError."""
    values = {name: getattr(args, name) for name in FIELDS if hasattr(args, name)}
    if args.threads is None:
        print_loading()
        import torch

        values["threads"] = torch.get_num_threads()
    values["adapters"] = tuple(args.adapters)
    values["tokens"] = collect_tokens(args.token)
    return ServeSettings(**values)
