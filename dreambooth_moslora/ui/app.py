"""Command line of `app.py`: parse the flags, find the bases and serve the page.

Loads no weights: the title, description and needs of each base follow from its files.
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
from dreambooth_moslora.settings.memory_presets import MEMORY_PLANS
from dreambooth_moslora.settings.setting_names import list_flags
from dreambooth_moslora.settings.train_config import TrainConfig

if TYPE_CHECKING:
    from dreambooth_moslora.ui.state import AppContext, PageBase

BYTES_A_PARAMETER = 2
"""Bytes of a parameter in weights that are fetched, in half precision."""
OFFERED_MODELS = {
    "SDXL": SDXL_HUB_ID,
    "Z-Image": "Tongyi-MAI/Z-Image",
    "FLUX.1": "black-forest-labs/FLUX.1-dev",
    "FLUX.2 klein": "black-forest-labs/FLUX.2-klein-base-4B",
}
"""Title in the list of bases -> hub id of a model that is offered whether or not it is here."""
FREE_CARD_GIB = {4: 3.3, 6: 5.0, 8: 6.9, 12: 10.2, 16: 14.6, 24: 20.8, 32: 29.0, 48: 45.0, 80: 78.0}
"""Size of a card, GB -> its free memory beside a screen, GiB."""
START_HINT = "start the page with `python app.py --base FOLDER_OR_FILE`"
"""Advice for a base that cannot be reached: the page itself has no field for a base."""
LOGIN_WARNING = (
    "whoever finds this address could train here: ask for a login with --auth NAME:PASSWORD, "
    "or start a page that only draws with --public"
)
"""Error for a page that other machines could use without a login."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `app.py`, each with underscores and with dashes."""

    def add(name: str, **options) -> None:
        names = list_flags("pretrained_model_name_or_path") if name == "base" else [f"--{name}"]
        spellings = dict.fromkeys([*names, *(f"--{flag[2:].replace('_', '-')}" for flag in names)])
        parser.add_argument(*spellings, dest=name, **options)

    # The base, and the folders of adapters and runs.
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
    # The address, and who may use it.
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
    """Run the program: 0 when the page was stopped, 2 for a mistake in the arguments."""
    # Before any library allocates memory.
    enable_expandable_segments()
    description = "A web page to generate with adapters and train them."
    parser = argparse.ArgumentParser(
        prog=prog, usage="%(prog)s [--FLAG VALUE …]", description=description
    )
    add_arguments(parser)
    args = parser.parse_args(argv)
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    os.environ.setdefault("GRADIO_ANALYTICS_MAX_EVENTS", "1")  # held in memory, with user names
    try:
        return serve(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def serve(args: argparse.Namespace) -> int:
    """Serve the page until it is stopped.

    Raises UserError for arguments that cannot be served.
    """
    # Report mistakes before gradio is imported, which takes seconds.
    Base.find(args.base)
    make_runs_folder(args.runs_dir)
    if not expand_user_path(args.adapters_dir).is_dir():
        raise UserError(f"--adapters_dir {args.adapters_dir}: there is no such folder")
    if sys.stderr.isatty():
        print("starting the page …", file=sys.stderr)
    from dreambooth_moslora.ui import guard, page
    from dreambooth_moslora.ui.workspace import GRADIO_FOLDER

    # Other machines need a login, or a page that only generates.
    allowed = set().union(*map(guard.parse_origins, args.allowed_host))
    logins = [parse_login(text) for text in args.auth or ()]
    is_exposed = args.share or args.server_name not in guard.LOOPBACK
    if (is_exposed or allowed) and not (logins or args.public):
        raise UserError(LOGIN_WARNING)
    # The base begins to load here. Gradio's files are deleted with the workspace.
    context = build_context(args)
    os.environ["GRADIO_TEMP_DIR"] = str(context.workspace.root / GRADIO_FOLDER)

    options = page.build_launch_options(allowed, any_host=is_exposed, public=args.public) | {
        "server_name": args.server_name,
        "server_port": args.server_port,
        "share": args.share,
        "auth": logins or None,
        "inbrowser": args.inbrowser,
        "prevent_thread_lock": True,
        "quiet": True,  # gradio's own lines advise `share=True` of its Python function
    }
    page.patch_url_probe()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so `finally` runs
    try:
        app = page.build_app(context)
        _, local_url, share_url = app.launch(**options)
        print(f"the page is at {share_url or local_url} (Ctrl-C ends it)", flush=True)
        app.block_thread()
    except OSError as error:
        raise UserError(f"the page cannot be served: {' '.join(str(error).split())}") from error
    finally:
        context.workspace.close()
    return 0


def parse_login(text: str) -> tuple[str, str]:
    """Return the name and the password. Raises UserError."""
    name, colon, password = text.partition(":")
    if not (name and colon and password):
        raise UserError("--auth needs NAME:PASSWORD")
    return name, password


def build_context(args: argparse.Namespace) -> "AppContext":
    """Build the state of the page, and begin to load its first base.

    `args` are those of `add_arguments`. Raises UserError.
    """
    runs_dir = make_runs_folder(args.runs_dir)
    from dreambooth_moslora.ui import state
    from dreambooth_moslora.ui.workspace import create_workspace

    first = Base.find(args.base)
    # A public page has one base.
    bases_by_title = {first.public_name: first} if args.public else list_bases(first)
    bases = [build_page_base(title, base) for title, base in bases_by_title.items()]
    # Only the first base is looked up on the hub, which takes seconds.
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
    """Return why the base cannot be reached and what helps; "" if it can be."""
    return (base.unreachable or "").replace(OTHER_BASE_ADVICE, START_HINT)


def build_page_base(title: str, base: Base) -> "PageBase":
    """Describe a base as the page offers it, without loading its weights."""
    from dreambooth_moslora.ui import state

    def load_pipeline():
        state.import_libraries()
        from dreambooth_moslora.generation.pipeline import SubjectPipeline

        # Look it up again: its files, or a connection, may have come since.
        fetch_index.cache_clear()
        current_base = Base.find(base.name)
        if current_base.unreachable:
            raise UserError(describe_problem(current_base))
        return SubjectPipeline.from_base(choose_variant(current_base), resting=True)

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
    """Create the folder and return it. Raises UserError if that fails."""
    try:
        folder = expand_user_path(text).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"--runs_dir {text} cannot be a folder: {format_error(error)}") from error


def list_bases(default_base: Base) -> dict[str, Base]:
    """Map titles to bases: `default_base`, the toys, and the offered models."""
    # The same files are offered once, under the first of their names.
    bases_by_path: dict[str, Base] = {}
    names = (*toy_bases.TOY_FOLDERS, *OFFERED_MODELS.values())
    for base in (default_base, *map(Base.find, names)):
        bases_by_path.setdefault(os.path.realpath(base.load_path), base)
    # A second base of the same name gets a number.
    offered_titles = {hub_id: title for title, hub_id in OFFERED_MODELS.items()}
    bases_by_title: dict[str, Base] = {}
    for base in bases_by_path.values():
        name = offered_titles.get(base.name) or clean_name(base.public_name)
        title = find_free_name(name, bases_by_title.__contains__, " ")
        bases_by_title[title] = base
    return bases_by_title


def choose_variant(base: Base) -> Base:
    """Return the base with fp16 files where the hub has them, half as many bytes."""
    is_stock = base.name == SDXL_HUB_ID and base.folder is None
    return replace(base, variant="fp16") if is_stock else base


def format_note(base: Base) -> str:
    """Return the note beside the base's title in the list; "" if there is none."""
    if base.is_toy:
        return "practice only"
    if base.published is None:
        return "" if base.folder or base.file else "a download"
    card = f"card of {estimate_card_gb(base)} GB"
    if base.folder:
        return card
    model = base.published[1]
    parameters = model.parameters + model.encoders + model.vae
    return f"{card}, {BYTES_A_PARAMETER * parameters / 1e9:.1f} GB to download"


def estimate_card_gb(base: Base) -> int:
    """Return the size of the smallest card that trains a published model, by the memory plan that
    needs least, GB."""
    from dreambooth_moslora.plan.base_size import find_base_size
    from dreambooth_moslora.plan.memory import estimate_memory
    from dreambooth_moslora.plan.memory_plans import USABLE_RATIO

    config = TrainConfig(
        pretrained_model_name_or_path=base.name,
        resolution=base.resolution_px,
        rank=16,  # the recipes'
        train_batch_size=1,
        mixed_precision="bf16",
        **list(MEMORY_PLANS.values())[-1],
    )
    need_gib = estimate_memory(config, find_base_size(base, config.target_modules), 1).peak_gib
    return next(gb for gb, free in FREE_CARD_GIB.items() if need_gib <= USABLE_RATIO * free)


def describe_base(base: Base) -> str:
    """Describe the base and its needs, without loading its weights."""
    if base.is_toy:
        return toy_bases.TOY_SUMMARY.format(base.facts.title)
    if not (base.folder or base.file):
        return f"it wants a GPU; {format_note(base)} when it is first used"
    is_small = base.resolution_px <= model_files.MAX_SMALL_BASE_PX
    needs = "it needs no GPU" if is_small else "it wants a GPU; without one a picture takes minutes"
    try:
        facts = (
            f"{base.facts.title}, {base.resolution_px} px, {base.weights_gib:.1f} GiB of weights"
        )
    except (UserError, OSError) as error:  # such as a link of the hub's cache whose file is gone
        return f"it cannot be used: {format_error(error)}"
    return f"{facts}: {needs}"
