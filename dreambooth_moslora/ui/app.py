"""From the command line of `app.py` to a running page. The base loads while the page is already up."""

import argparse
import json
import os
import signal
import sys
from pathlib import Path

from dreambooth_moslora.base.files import resolve_base
from dreambooth_moslora.core import TOY_TEMPLATES, UserError, assets_folder, one_line, public_name, user_path
from dreambooth_moslora.disk.processes import avoid_fragmentation, share_heaps
from dreambooth_moslora.generation.remote import TOKEN_VARIABLE, RemotePipeline, Service
from dreambooth_moslora.plan.memory import SDXL
from dreambooth_moslora.settings.families import Facts

DEFAULT_RESOLUTION_PX = 1024
MAX_PORT = 65535


def add_arguments(parser: argparse.ArgumentParser) -> None:
    def add(name: str, **options) -> None:
        parser.add_argument(*dict.fromkeys([f"--{name}", f"--{name.replace('_', '-')}"]), dest=name, **options)

    add("base", default="toy", help='a folder, a hub id, a .safetensors file, or "toy", the embedded base (default)')
    add("bases_dir", metavar="DIR", help="folder below which bases lie: the page lets you choose one (not if public)")
    add("adapters_dir", default=str(assets_folder() / "adapters"), help="folder of .safetensors adapters to offer")
    add("runs_dir", default="runs", help="folder of training runs (default runs)")
    add("server_name", default="127.0.0.1", help="address to listen on (default 127.0.0.1: this machine only)")
    add("server_port", type=int, help="default: the first free one from 7860")
    add(
        "allowed_host",
        action="append",
        default=[],
        metavar="NAME",
        help="the name or address that a proxy gives this page; repeatable",
    )
    add("share", action="store_true", help="also open a public gradio.live address")
    add("auth", action="append", metavar="NAME:PASSWORD", help="ask for a login; repeatable")
    add("backend", metavar="URL", help="draw by `dreambooth_moslora serve` there, with the same base and adapters")
    add("backend_token", help=f"its token (default: that of {TOKEN_VARIABLE} in the environment)")
    add("inbrowser", action="store_true", help="open a browser window")


def main(argv: list[str] | None = None, prog: str = "app.py") -> int:
    avoid_fragmentation()
    share_heaps()
    parser = argparse.ArgumentParser(prog=prog, description="A web page to generate with adapters and train them.")
    add_arguments(parser)
    args = parser.parse_args(argv)
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        return serve(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def serve(args: argparse.Namespace) -> int:
    resolve_base(args.base)
    from dreambooth_moslora.ui import bases

    if user_path(args.runs_dir).exists():
        runs_folder(args.runs_dir)
    if not user_path(args.adapters_dir).is_dir():
        absent = f"--adapters_dir {args.adapters_dir}: there is no such folder"
        print(f"note: {absent}, so the page offers the adapters of runs alone", file=sys.stderr)
    if args.bases_dir:
        bases.require_bases_dir(user_path(args.bases_dir))
    from dreambooth_moslora.ui import guard, page  # gradio takes seconds

    if args.server_port is not None and not 1 <= args.server_port <= MAX_PORT:
        raise UserError(f"--server_port {args.server_port} is not a port; choose one from 1 to {MAX_PORT}")
    allowed = set().union(*map(guard.origins_of, args.allowed_host))
    logins = [parse_login(text) for text in args.auth or ()]
    is_public = args.share or args.server_name not in guard.LOOPBACK
    if is_public and not logins:
        print("warning: everybody who finds this address can use it; training is off without --auth", file=sys.stderr)
    context = context_of(args, training=bool(logins) or not is_public, public=is_public or bool(allowed))
    os.environ["GRADIO_TEMP_DIR"] = str(context.visitors.root / "gradio")  # so uploads are deleted with the visitors'

    options = page.launch_options(allowed, public=is_public) | {
        "server_name": args.server_name,
        "server_port": args.server_port,
        "share": args.share,
        "auth": logins or None,
        "inbrowser": args.inbrowser,
    }
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # deletes the visitors' files
    try:
        page.build_app(context, templates_for(args.base)).launch(**options)
    except OSError as error:
        raise UserError(f"the page cannot be served: {' '.join(str(error).split())}") from error
    finally:
        context.visitors.close()
    return 0


def parse_login(text: str) -> tuple[str, str]:
    """The name and the password. Raises UserError."""
    name, colon, password = text.partition(":")
    if not (name and colon and password):
        raise UserError("--auth needs NAME:PASSWORD")
    return name, password


def context_of(args: argparse.Namespace, *, training: bool, public: bool = False):
    """Start loading the base, and tell the page what it needs before that is loaded. Raises UserError."""
    runs_dir = runs_folder(args.runs_dir)
    from dreambooth_moslora.ui import bases, state

    bases_dir = user_path(args.bases_dir).resolve() if args.bases_dir else None
    names = {public_name(args.base): args.base} if public or args.backend else bases.offered(args.base, bases_dir)
    first, *others = (page_base(title, name, args) for title, name in names.items())
    return state.AppContext(
        first.load,
        base=first.title,
        base_name=first.name,
        resolution_px=first.resolution_px,
        adapters_dir=user_path(args.adapters_dir).resolve(),
        runs_dir=runs_dir,
        training=training,
        public=public,
        about=first.about,
        templates=first.templates,
        others=others,
    )


def page_base(title: str, name: str, args: argparse.Namespace):
    """A base as the page offers it, by its files alone."""
    from dreambooth_moslora.ui import bases, state

    folder = base_folder(name)
    token = args.backend_token or os.environ.get(TOKEN_VARIABLE)

    def load():
        state.import_libraries()
        if args.backend:
            return RemotePipeline(Service(args.backend, token), public_name(name))
        from dreambooth_moslora.generation.pipeline import SubjectPipeline

        return SubjectPipeline.from_base(name, resting=True)

    place = folder or bases.cached_folder(name)
    resolution_px = resolution_of(place)
    path = str(folder.resolve()) if folder and name != "toy" else str(name)
    return bases.PageBase(
        title, path, resolution_px, load, bases.about(name, place, resolution_px), tuple(templates_for(name))
    )


def runs_folder(text: str) -> Path:
    """The folder, made if needed. Raises UserError when that fails."""
    try:
        folder = user_path(text).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"--runs_dir {text} cannot be a folder: {one_line(error)}") from error


def base_folder(name: str) -> Path | None:
    """The base's local folder or file; None for a hub id."""
    path = assets_folder() / "toy-sdxl" if name == "toy" else user_path(name)
    return path if path.exists() else None


def resolution_of(folder: Path | None, facts: Facts = SDXL) -> int:
    """The base's own size in px, from its config alone: the page must not wait for the weights."""
    if facts.style == "flow":
        return facts.resolution_px
    try:
        unet = json.loads((folder / "unet" / "config.json").read_text(encoding="utf-8"))
        vae = json.loads((folder / "vae" / "config.json").read_text(encoding="utf-8"))
        return int(unet["sample_size"]) * 2 ** (len(vae["block_out_channels"]) - 1)
    except (OSError, TypeError, KeyError, ValueError):
        return DEFAULT_RESOLUTION_PX


def templates_for(base: str) -> list[str]:
    """Prompts with `{}` for the subject: the toy world's own, or the DreamBooth paper's."""
    from dreambooth_moslora.settings.prompts import DREAMBOOTH_LIVE_TEMPLATES, DREAMBOOTH_OBJECT_TEMPLATES

    return list(TOY_TEMPLATES) if base == "toy" else [*DREAMBOOTH_OBJECT_TEMPLATES, *DREAMBOOTH_LIVE_TEMPLATES]
