"""From the command line of `app.py` to a running page, which loads its base while it is already up.

Which bases it offers by name, and what each is and needs, follows from their files alone.
"""

import argparse
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from dreambooth_moslora.base import model_files
from dreambooth_moslora.base.base import OTHER_BASE_ADVICE, Base, fetch_index
from dreambooth_moslora.disk.paths import expand_user_path, find_free_name, get_assets_folder
from dreambooth_moslora.disk.processes import enable_expandable_segments
from dreambooth_moslora.disk.run_folder import clean_name
from dreambooth_moslora.errors import UserError, format_error
from dreambooth_moslora.settings import toy_bases
from dreambooth_moslora.settings.family_facts import SDXL_HUB_ID
from dreambooth_moslora.settings.train_config import list_flags

if TYPE_CHECKING:
    from dreambooth_moslora.ui.state import AppContext, PageBase

BYTES_A_PARAMETER = 2
"""Of weights that are fetched, in half precision."""
START_HINT = "start the page with `python app.py --base FOLDER_OR_FILE`"
"""What helps on the page where nobody has a base: it takes none itself."""
LOGIN_WARNING = (
    "whoever finds this address could train here: ask for a login with --auth NAME:PASSWORD, "
    "or start a page that only draws with --public"
)
"""Why a page is not served to others as it is."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `app.py`, each with underscores and with dashes."""

    def add(name: str, **options) -> None:
        names = list_flags("pretrained_model_name_or_path") if name == "base" else [f"--{name}"]
        spellings = dict.fromkeys([*names, *(f"--{one[2:].replace('_', '-')}" for one in names)])
        parser.add_argument(*spellings, dest=name, **options)

    # What it draws with, and where it finds and keeps what it shows.
    add(
        "base",
        default="toy",
        help='a folder, a hub id, a .safetensors file, or "toy", the embedded base (default)',
    )
    add(
        "adapters_dir",
        default=str(get_assets_folder() / "adapters"),
        help="folder of .safetensors adapters to offer",
    )
    add("runs_dir", default="runs", help="folder of training runs (default runs)")
    # Where it listens, and who may come.
    add(
        "server_name",
        default="127.0.0.1",
        help="address to listen on (default 127.0.0.1: this machine only)",
    )
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
    add(
        "public",
        action="store_true",
        help="a page for everybody, which only draws, with the adapters of --adapters_dir",
    )
    add("inbrowser", action="store_true", help="open a browser window")


def main(argv: list[str] | None = None, prog: str = "app.py") -> int:
    """The program: 0 when the page was stopped, 2 for a mistake in its arguments."""
    # Before any library allocates memory.
    enable_expandable_segments()
    about = "A web page to generate with adapters and train them."
    parser = argparse.ArgumentParser(
        prog=prog, usage="%(prog)s [--FLAG VALUE …]", description=about
    )
    add_arguments(parser)
    args = parser.parse_args(argv)
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    os.environ.setdefault("GRADIO_ANALYTICS_MAX_EVENTS", "1")  # kept in memory, with their names
    try:
        return serve(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def serve(args: argparse.Namespace) -> int:
    """Serve the page until it is stopped.

    Raises UserError for arguments that cannot be served.
    """
    # Mistakes are told before gradio is imported, which takes seconds.
    Base.find(args.base)
    make_runs_folder(args.runs_dir)
    if not expand_user_path(args.adapters_dir).is_dir():
        raise UserError(f"--adapters_dir {args.adapters_dir}: there is no such folder")
    if sys.stderr.isatty():
        print("starting the page …", file=sys.stderr)
    from dreambooth_moslora.ui import guard, page
    from dreambooth_moslora.ui.workspace import GRADIO_FOLDER

    # Who may reach the page: others need a login, or a page that only draws.
    allowed = set().union(*map(guard.parse_origins, args.allowed_host))
    logins = [parse_login(text) for text in args.auth or ()]
    is_exposed = args.share or args.server_name not in guard.LOOPBACK
    if (is_exposed or allowed) and not (logins or args.public):
        raise UserError(LOGIN_WARNING)
    # The base begins to load here. What gradio keeps is deleted with the workspace.
    context = build_context(args)
    os.environ["GRADIO_TEMP_DIR"] = str(context.workspace.root / GRADIO_FOLDER)

    options = page.build_launch_options(allowed, any_host=is_exposed, public=args.public) | {
        "server_name": args.server_name,
        "server_port": args.server_port,
        "share": args.share,
        "auth": logins or None,
        "inbrowser": args.inbrowser,
    }
    page.patch_url_probe()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so `finally` runs
    try:
        page.build_app(context).launch(**options)
    except OSError as error:
        raise UserError(f"the page cannot be served: {' '.join(str(error).split())}") from error
    finally:
        context.workspace.close()
    return 0


def parse_login(text: str) -> tuple[str, str]:
    """The name and the password. Raises UserError."""
    name, colon, password = text.partition(":")
    if not (name and colon and password):
        raise UserError("--auth needs NAME:PASSWORD")
    return name, password


def build_context(args: argparse.Namespace) -> "AppContext":
    """The state of the page, which starts to load its first base.

    `args` are the program's. Raises UserError.
    """
    runs_dir = make_runs_folder(args.runs_dir)
    from dreambooth_moslora.ui import state
    from dreambooth_moslora.ui.workspace import create_workspace

    first = Base.find(args.base)
    # A public page has one base.
    found = {first.public_name: first} if args.public else list_bases(first)
    bases = [build_page_base(title, base) for title, base in found.items()]
    # Only the base that was asked for is looked for on the hub, which takes seconds.
    bases[0] = replace(bases[0], problem=describe_problem(first))
    adapters_dir = expand_user_path(args.adapters_dir).resolve()
    return state.AppContext(
        *bases,
        adapters_dir=adapters_dir,
        runs_dir=runs_dir,
        workspace=create_workspace(),
        public=args.public,
    )


def describe_problem(base: Base) -> str:
    """Why nobody has it, and what helps on the page; "" where one has it."""
    return (base.unreachable or "").replace(OTHER_BASE_ADVICE, START_HINT)


def build_page_base(title: str, base: Base) -> "PageBase":
    """A base as the page offers it, by its files alone."""
    from dreambooth_moslora.ui import state

    def load_pipeline():
        state.import_libraries()
        from dreambooth_moslora.generation.pipeline import SubjectPipeline

        # Found anew: its files, or a connection, may have come since.
        fetch_index.cache_clear()
        now = Base.find(base.name)
        if now.unreachable:
            raise UserError(describe_problem(now))
        return SubjectPipeline.from_base(choose_variant(now), resting=True)

    is_named = base.path is None or base.name in toy_bases.TOY_FOLDERS
    return state.PageBase(
        title=title,
        name=base.name if is_named else str(base.path.resolve()),
        resolution_px=base.resolution_px,
        load=load_pipeline,
        description=describe_base(base),
        note=format_note(base),
        public_name=base.public_name,
    )


def make_runs_folder(text: str) -> Path:
    """The folder, made if needed. Raises UserError when that fails."""
    try:
        folder = expand_user_path(text).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"--runs_dir {text} cannot be a folder: {format_error(error)}") from error


def list_bases(default_base: Base) -> dict[str, Base]:
    """Title -> each base: the operator's `first`, the toys, and SDXL."""
    sdxl = Base.find(SDXL_HUB_ID)
    # The same files are offered once, under the first of their names.
    places: dict[str, Base] = {}
    for base in (default_base, *map(Base.find, toy_bases.TOY_FOLDERS), sdxl):
        places.setdefault(os.path.realpath(base.place), base)
    # Two bases of the same name are told apart by a number.
    from dreambooth_moslora.ui.state import SDXL_TITLE

    found: dict[str, Base] = {}
    for base in places.values():
        name = SDXL_TITLE if base is sdxl else clean_name(base.public_name)
        title = find_free_name(name, found.__contains__, " ")
        found[title] = base
    return found


def choose_variant(base: Base) -> Base:
    """The base with the files that are fetched for it: half as many bytes, where the hub has
    them."""
    is_stock = base.name == SDXL_HUB_ID and base.folder is None
    return replace(base, variant="fp16") if is_stock else base


def format_note(base: Base) -> str:
    """What stands beside its title in the list; "" if nothing has to be known."""
    if base.is_toy:
        return "practice only"
    if base.folder or base.file:
        return ""
    if base.known is None:
        return "a download"
    model = base.known[1]
    parameters = model.parameters + model.encoders + model.vae
    return f"a download of {BYTES_A_PARAMETER * parameters / 1e9:.1f} GB"


def describe_base(base: Base) -> str:
    """What the base is and needs; its files are not loaded."""
    if base.is_toy:
        return toy_bases.TOY_SUMMARY.format(base.facts.title)
    if not (base.folder or base.file):
        return f"{format_note(base)} when it is first used; it wants a GPU"
    is_small = base.resolution_px <= model_files.MAX_SMALL_BASE_PX
    needs = "it needs no GPU" if is_small else "it wants a GPU; without one a picture takes minutes"
    try:
        has = f"{base.facts.title}, {base.resolution_px} px, {base.weights_gib:.1f} GiB of weights"
    except (UserError, OSError) as error:  # such as a link of the hub's cache whose file is gone
        return f"it cannot be used: {format_error(error)}"
    return f"{has}: {needs}"
