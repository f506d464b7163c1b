"""Page of the app: heading, tabs, and options by which it is served.

The Inspect tab, for PNGs and adapters, is here.
"""

import threading
import time
from collections.abc import Collection, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import gradio as gr
from gradio import networking
from starlette.middleware import Middleware

from dreambooth_moslora.errors import UserError
from dreambooth_moslora.generation.image_params import SCHEDULERS, Recipe, read_recipe
from dreambooth_moslora.settings.toy_bases import is_toy
from dreambooth_moslora.ui import generate_values, guard, html, state
from dreambooth_moslora.ui.events import (
    GPU_EVENT,
    MESSAGE_EVENT,
    UNQUEUED_EVENT,
    convert_to_user_error,
    format_message,
    on,
)
from dreambooth_moslora.ui.generate_adapters import find_fitting_adapter
from dreambooth_moslora.ui.generate_tab import (
    IMAGE_SUFFIXES,
    GenerateTab,
    build_generate_tab,
    to_widgets,
)
from dreambooth_moslora.ui.train import screen, train_form
from dreambooth_moslora.ui.train.run_list import list_runs

MAX_SESSIONS = 256
"""Sessions of 250 KB each; gradio's default is 10,000. A page whose session is dropped begins a new
one at the next click."""
MAX_WAITING = 64
"""Requests that may wait for a public page; after that, it answers that the queue is full."""
URL_PROBES = 10
"""Probes with which gradio tests whether its page answers, each for up to three seconds."""
FILE_CHECK_SEC = 600
"""Seconds between two searches for old files."""
FILE_AGE_SEC = 24 * 3600
"""Age at which they are deleted."""
PUBLIC_FILE_AGE_SEC = 3600
"""Age on a public page, whose visitors may generate without end."""
BASE_POLL_SEC = 2.0
"""Seconds between two looks whether another browser has selected another base."""
INSPECT_HINT = html.render_notice("Drop a PNG of this page, or a .safetensors adapter.")
"""Text of the Inspect tab before a file is dropped."""


def build_app(ctx: state.AppContext) -> gr.Blocks:
    """Build the page with its queue; unless it is public, a thread trains the queued runs."""
    with gr.Blocks(title="dreambooth_moslora", analytics_enabled=False) as page:
        with gr.Row(elem_id="top"):
            gr.HTML("<h1>dreambooth_moslora</h1>")
            chooser = build_base_chooser(ctx)
        base_line = gr.HTML(render_base_line(ctx), elem_id="about_base")
        # The tabs. A public page only generates; without a run, training comes first.
        is_new = not ctx.public and not list_runs(ctx.jobs)
        with gr.Tabs(elem_id="tabs", selected="train" if is_new else "generate") as tabs:
            with gr.Tab("Generate", id="generate"):
                generate = build_generate_tab(ctx, page)
            if not ctx.public:
                with gr.Tab("Train", id="train"):
                    trained = screen.build_train_tab(ctx, page, tabs, generate)
                with gr.Tab("Inspect", id="inspect"):
                    build_inspect_tab(ctx, tabs, generate)
        # Fields that depend on the base change with it, in every tab.
        if chooser is not None:
            widgets = generate.base_fields | trained
            connect_bases(ctx, page, chooser, base_line, widgets)
    # The clean-up of files, the queue of requests, and the thread that trains the queued runs.
    threading.Thread(target=clean_old_files, args=(ctx,), name="old-files", daemon=True).start()
    guard.install_stall_limit()
    guard.raise_connection_limit()
    if ctx.public:
        page.queue(api_open=False, max_size=MAX_WAITING)
        guard.protect_queue(page)
        guard.refuse_foreign_files(page)
    else:
        page.queue(api_open=False)
        threading.Thread(target=ctx.queue.run_forever, name="queue", daemon=True).start()
    return page


def clean_old_files(ctx: state.AppContext) -> None:
    """Delete files that were shown long ago, for ever."""
    while True:
        time.sleep(FILE_CHECK_SEC)
        ctx.workspace.delete_old(PUBLIC_FILE_AGE_SEC if ctx.public else FILE_AGE_SEC)


def build_base_chooser(ctx: state.AppContext) -> gr.Dropdown | None:
    """Build the list of bases; None if there is only one."""
    if len(ctx.bases) == 1:
        return None
    look = {"show_label": False, "container": False, "min_width": 280, "elem_id": "base"}
    choices = [(base.label, title) for title, base in ctx.bases.items()]
    return gr.Dropdown(choices, value=ctx.base, label="Base", **look)


def render_base_line(ctx: state.AppContext, mistake: str = "") -> str:
    """Describe the base in one sentence, after a mistake if there was one."""
    description = f": {ctx.current_base.description}" if ctx.current_base.description else ""
    line = html.render_faint(f"{format_message(ctx.base)}{description}.")
    if not mistake and ctx.get_loaded_pipeline() is None:
        mistake = ctx.current_base.problem
    return html.render_notice(format_message(mistake), "bad") + line if mistake else line


def connect_bases(
    ctx: state.AppContext,
    page: gr.Blocks,
    chooser: gr.Dropdown,
    about_line: gr.HTML,
    widgets: dict,
) -> None:
    """Load the selected base; it becomes that of every page.

    - `about_line` describes the base.
    - `widgets`, by name, have other values for another base (`get_first_value`).
    """
    shown_base = gr.State(ctx.base)
    outputs = [chooser, about_line, *widgets.values(), shown_base]

    def list_values() -> list:
        values = [get_first_value(ctx, name) for name in widgets]
        return [gr.Dropdown(value=ctx.base), render_base_line(ctx), *values, ctx.base]

    def choose(title: str) -> Iterator[list]:
        unchanged = [gr.skip()] * (len(widgets) + 1)
        try:
            base = ctx.bases[title]
            # The line counts the seconds while it loads.
            for seconds in ctx.choose(base):
                line = f"Loading {title}: {base.description} … {html.format_seconds(seconds)}"
                yield [gr.skip(), html.render_faint(line), *unchanged]
        except Exception as error:
            # The former base is still loaded: select it again.
            mistake = f"{title!s:.60} is not loaded: {convert_to_user_error(error)}"
            yield [gr.Dropdown(value=ctx.base), render_base_line(ctx, mistake), *unchanged]
        else:
            yield list_values()

    loading = {
        "outputs": outputs,
        "api_visibility": "private",
        "show_progress": "hidden",
        **GPU_EVENT,
    }
    on(chooser.input, inputs=chooser, **loading)(choose)

    # Another browser may have selected another base since the page was built, or shown it.
    page.load(list_values, None, outputs, **UNQUEUED_EVENT)

    def follow(title: str) -> list:
        return [gr.skip()] * len(outputs) if title == ctx.base else list_values()

    gr.Timer(BASE_POLL_SEC).tick(follow, shown_base, outputs, **UNQUEUED_EVENT)


def get_first_value(ctx: state.AppContext, name: str) -> Any:
    """Return the first value of the widget of that name, for the base of the page."""
    if name == "size":
        sizes = generate_values.list_size_choices(ctx.resolution_px, ctx.facts.multiple_px)
        return gr.Dropdown(choices=sizes, value=sizes[0][1])
    if name == "adapter":
        return find_fitting_adapter(ctx)
    if name == "guidance_scale":
        return ctx.guidance_scale
    if name == "negative_prompt":
        return gr.update(visible=ctx.facts.has_negative)
    if name == "scheduler":
        return gr.update(visible=ctx.facts.style == "ddpm")
    # All other names are fields of the Train tab.
    row = train_form.list_form_fields()[name]
    value = row.get_first_value(ctx.base_name)
    if row.hides_for_toys:
        return gr.update(value=value, visible=not is_toy(ctx.base_name))
    return gr.update(value=value)


@cache
def patch_url_probe() -> None:
    """Let gradio probe its own page for up to half a minute: on a busy machine it gives up after
    three seconds, and does not start.
    """
    probe_url = networking.url_ok
    networking.url_ok = lambda url: any(probe_url(url) for _ in range(URL_PROBES))


def build_launch_options(
    allowed: Collection[guard.Origin] = (),
    *,
    any_host: bool = False,
    public: bool = False,
) -> dict[str, Any]:
    """Build the common options for `launch()`.

    - The page answers to the loopback's names and to those of the `allowed` origins.
    - With `any_host` it answers to every name.
    - A `public` page takes no files.
    """
    hosts = None if any_host else guard.LOOPBACK | {name for _, name, _ in allowed}
    return {
        # The look, and gradio's links at the foot.
        "theme": html.THEME,
        "css": html.CSS,
        "head": html.HEAD,
        "footer_links": ["api"],
        "run_history": False,
        # Limits of requests and sessions.
        "state_session_capacity": MAX_SESSIONS,
        "app_kwargs": {
            "middleware": [Middleware(guard.PublicPageGuard if public else guard.LoginGuard)],
            "lifespan": partial(guard.install_trusted_hosts, hosts, allowed),
        },
        "enable_monitoring": False,
        "share": False,
        "ssr_mode": False,
    }


def build_inspect_tab(ctx: state.AppContext, tabs: gr.Tabs, generate: GenerateTab) -> None:
    """Build the Inspect tab, which shows the facts in a dropped file."""
    with gr.Row(elem_id="inspect", equal_height=False):
        with gr.Column(min_width=280, scale=2):
            file = gr.File(
                file_types=[*IMAGE_SUFFIXES, ".safetensors"],
                label="Picture or adapter",
                height=160,
                elem_id="inspect_file",
            )
            use = gr.Button(
                "Use these settings", visible=False, variant="primary", elem_id="inspect_use"
            )
        with gr.Column(min_width=280, scale=3):
            facts = gr.HTML(INSPECT_HINT, elem_id="inspect_facts", label="Facts")
    fields = list(generate.fields.values())

    # Show the recipe of an image, or the header of an adapter.
    @on(
        [file.upload, file.clear],
        inputs=file,
        outputs=[facts, use],
        api_name="inspect",
        concurrency_limit=2,
    )
    def inspect_file(file: str | None) -> tuple:
        if not file:
            return INSPECT_HINT, gr.Button(visible=False)
        is_image = Path(file).suffix.lower() != ".safetensors"
        facts_rows = list_recipe_facts(read_recipe(file)) if is_image else list_adapter_facts(file)
        return html.render_facts(facts_rows), gr.Button(visible=is_image)

    # Put an image's recipe into the Generate tab.
    @on(use.click, MESSAGE_EVENT, inputs=file, outputs=[tabs, *fields], show_progress_on=fields)
    def apply_recipe(file: str | None) -> list:
        if not file:
            raise UserError("drop a picture first")
        return [gr.Tabs(selected="generate"), *to_widgets(ctx, read_recipe(file))]


def list_recipe_facts(recipe: Recipe) -> list[tuple[str, str]]:
    """Return (name, value) of each part of a recipe; a value is empty if the recipe has none."""
    params = recipe.params
    origin = recipe.provenance
    hashes = dict(origin.adapter_sha256)

    # Each adapter with the digest of its file.
    adapters = []
    for name, scale in params.adapters:
        line = f"{name}, scale {scale:g}"
        if name in hashes:
            line += f"\nsha256 {hashes[name]}"
        adapters.append(("Adapter", line))

    # Values that an older recipe may leave out.
    size = f"{params.width_px} × {params.height_px} px" if params.width_px else ""
    guidance = "" if params.guidance_scale is None else f"{params.guidance_scale:g}"
    scheduler = SCHEDULERS[params.scheduler].title if params.scheduler else ""
    return [
        ("Prompt", params.prompt),
        ("Negative prompt", params.negative_prompt),
        *adapters,
        ("Seed", str(params.seed)),
        ("Steps", str(params.steps)),
        ("Guidance", guidance),
        ("Size", size),
        ("Scheduler", scheduler),
        ("Base", origin.base),
        ("Made with", ", ".join(f"{name} {version}" for name, version in origin.versions)),
    ]


def list_adapter_facts(file: str) -> list[tuple[str, str]]:
    """List the lines of `info` for any LoRA file."""
    state.import_libraries()
    from dreambooth_moslora.lora.describe import describe, format_label, format_value

    return [
        (format_label(name), format_value(name, value)) for name, value in describe(file).items()
    ]
