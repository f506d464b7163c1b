"""The adapter of the Generate tab: the list, what the chosen one says of itself, and uploads."""

import shutil
from dataclasses import asdict

import gradio as gr

from dreambooth_moslora.disk.run_folder import NONE
from dreambooth_moslora.settings.toy_bases import is_toy
from dreambooth_moslora.ui import state
from dreambooth_moslora.ui.adapter_summary import summary_of
from dreambooth_moslora.ui.events import AT_ONCE, GPU, on
from dreambooth_moslora.ui.html import faint


def fitting_adapter(ctx: state.AppContext) -> str:
    """The first adapter that may be for the page's base: a toy's is for toys alone."""
    for name, file in ctx.catalog.files().items():
        if is_toy(summary_of(file).base) == is_toy(ctx.base_name):
            return name
    return NONE


def connect_adapters(ctx: state.AppContext, page: gr.Blocks, fields: dict, buttons: dict) -> None:
    """The list is read anew, and what the chosen one says of itself is shown and filled in."""
    adapter = fields["adapter"]
    prompt = fields["prompt"]

    @on(gr.api, api_name="adapters", queue=False)
    def listed() -> list[dict]:
        """Name and summary of every adapter."""
        found = ctx.catalog.files()
        return [{"name": name, **asdict(summary_of(file))} for name, file in found.items()]

    # Runs may have written new ones.
    @on([buttons["refresh"].click, page.load], AT_ONCE, inputs=None, outputs=adapter)
    def adapters() -> gr.Dropdown:
        return gr.Dropdown(choices=[NONE, *ctx.catalog.files()])

    @on(adapter.change, AT_ONCE, inputs=[adapter, prompt], outputs=[buttons["about"], prompt])
    def describe(name: str, old_prompt: str) -> tuple:
        files = ctx.catalog.files()
        if name not in files:
            return gr.HTML(faint(""), visible=False), gr.skip()
        summary = summary_of(files[name])
        words = summary.sentence()
        # The adapter's own words replace those that another one had filled in, not the user's.
        untouched = {"", *(summary_of(file).prompt for file in files.values())}
        is_untouched = (old_prompt or "").strip() in untouched
        renewed = summary.prompt if is_untouched else ""
        return gr.HTML(faint(words), visible=bool(words)), renewed or old_prompt


def connect_upload(ctx: state.AppContext, fields: dict, button: gr.UploadButton) -> None:
    """An uploaded adapter is loaded at once, to say now if it does not fit the base."""
    adapter = fields["adapter"]

    @on(button.upload, GPU, inputs=button, outputs=adapter, api_visibility="private")
    def upload(file: str) -> gr.Dropdown:
        name = ctx.catalog.add_upload(file)
        try:
            ctx.pipeline().load_adapter(ctx.workspace.uploads[name], name)
        except Exception:
            # It is not offered, and its file goes.
            shutil.rmtree(ctx.workspace.uploads.pop(name).parent, ignore_errors=True)
            raise
        return gr.Dropdown(choices=[NONE, *ctx.catalog.files()], value=name)
