"""The whole page: a heading, the tabs, and how it is served."""

from collections.abc import Collection
from html import escape
from typing import Any

import gradio as gr
from starlette.middleware import Middleware

from dreambooth_moslora.ui.generate import build_generate_tab
from dreambooth_moslora.ui.guard import LOOPBACK, MAX_UPLOAD_BYTES, BodySizeLimit, Origin, UploadQuota, outermost
from dreambooth_moslora.ui.html import CSS, HEAD, theme
from dreambooth_moslora.ui.inspect import build_inspect_tab
from dreambooth_moslora.ui.state import AppContext
from dreambooth_moslora.ui.train import build_train_tab
from dreambooth_moslora.ui.visitors import VisitorCookie

MAX_SESSIONS = 256
"""Of 250 KB each; by itself Gradio remembers 10,000. Whose session is forgotten begins a new one at the next click."""
CACHE_CHECK_SEC, CACHE_AGE_SEC = 3600, 24 * 3600


def build_app(ctx: AppContext, templates: list[str]) -> gr.Blocks:
    """The page as a Blocks with its queue. If `ctx.training` allows it, it has the training tab and trains the
    queued runs."""
    with gr.Blocks(
        title="dreambooth_moslora", analytics_enabled=False, delete_cache=(CACHE_CHECK_SEC, CACHE_AGE_SEC)
    ) as page:
        with gr.Row(elem_id="top"):
            gr.HTML("<h1>dreambooth_moslora</h1>")
            gr.HTML(f'<div class="faint">base: {escape(ctx.base)}</div>')
        with gr.Tabs(elem_id="tabs") as tabs:
            with gr.Tab("Generate", id="generate"):
                generate = build_generate_tab(ctx, page, templates)
            if ctx.training:
                with gr.Tab("Train", id="train"):
                    build_train_tab(ctx, ctx.jobs, page, tabs, generate)
            with gr.Tab("Inspect", id="inspect"):
                build_inspect_tab(ctx, tabs, generate)
    page.queue(api_open=False)
    if ctx.public:
        from dreambooth_moslora.ui.public import protect

        protect(page)
    if ctx.training:
        ctx.queue.in_background()
    return page


def launch_options(allowed: Collection[Origin] = (), *, public: bool = False) -> dict[str, Any]:
    """The common options for `launch()`.

    The page answers to the loopback's names and those of the `allowed` origins, a `public` page to every name; no page
    answers to another site's page. Strangers can reach a public page, and one of an allowed origin: both have the
    layers of `public`.
    """
    layers = [BodySizeLimit, UploadQuota, VisitorCookie]
    if public or allowed:
        from dreambooth_moslora.ui.public import LAYERS

        layers[2:2] = LAYERS
    hosts = None if public else LOOPBACK | {name for _, name, _ in allowed}
    return {
        "theme": theme(),
        "css": CSS,
        "head": HEAD,
        "footer_links": ["api"],
        "run_history": False,
        "max_file_size": MAX_UPLOAD_BYTES,
        "state_session_capacity": MAX_SESSIONS,
        "app_kwargs": {
            "middleware": list(map(Middleware, layers)),
            "lifespan": outermost(hosts, allowed),
        },
        "enable_monitoring": False,
        "share": False,
        "ssr_mode": False,
    }
