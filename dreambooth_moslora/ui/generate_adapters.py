"""The adapter of the Generate tab: the list, what the chosen one says of itself, and uploads."""

import shutil
from dataclasses import asdict

import gradio as gr

from dreambooth_moslora.disk.run_folder import NO_ADAPTER
from dreambooth_moslora.settings.toy_bases import is_toy
from dreambooth_moslora.ui import state
from dreambooth_moslora.ui.adapter_summary import read_summary
from dreambooth_moslora.ui.events import GPU_EVENT, UNQUEUED_EVENT, on
from dreambooth_moslora.ui.html import render_faint


def find_fitting_adapter(ctx: state.AppContext) -> str:
    """The first adapter that may be for the page's base: a toy's is for toys alone."""
    for name, file in ctx.catalog.list_files().items():
        if is_toy(read_summary(file).base) == is_toy(ctx.base_name):
            return name
    return NO_ADAPTER


def connect_adapters(ctx: state.AppContext, page: gr.Blocks, fields: dict, buttons: dict) -> None:
    """The list is read anew, and what the chosen one says of itself is shown and filled in."""
    adapter = fields["adapter"]
    prompt = fields["prompt"]

    @on(gr.api, api_name="adapters", queue=False)
    def list_adapters() -> list[dict]:
        """Name and summary of every adapter."""
        found = ctx.catalog.list_files()
        return [{"name": name, **asdict(read_summary(file))} for name, file in found.items()]

    # Runs may have written new ones.
    @on([buttons["refresh"].click, page.load], UNQUEUED_EVENT, inputs=None, outputs=adapter)
    def update_choices() -> gr.Dropdown:
        return gr.Dropdown(choices=[NO_ADAPTER, *ctx.catalog.list_files()])

    @on(
        adapter.change, UNQUEUED_EVENT, inputs=[adapter, prompt], outputs=[buttons["about"], prompt]
    )
    def describe(name: str, old_prompt: str) -> tuple:
        files = ctx.catalog.list_files()
        if name not in files:
            return gr.HTML(render_faint(""), visible=False), gr.skip()
        summary = read_summary(files[name])
        words = summary.format_sentence()
        # The adapter's own words replace those that another one had filled in, not the user's.
        untouched = {"", *(read_summary(file).prompt for file in files.values())}
        is_untouched = (old_prompt or "").strip() in untouched
        renewed = summary.prompt if is_untouched else ""
        return gr.HTML(render_faint(words), visible=bool(words)), renewed or old_prompt


def connect_upload(ctx: state.AppContext, fields: dict, button: gr.UploadButton) -> None:
    """An uploaded adapter is loaded at once, to say now if it does not fit the base."""
    adapter = fields["adapter"]

    @on(button.upload, GPU_EVENT, inputs=button, outputs=adapter, api_visibility="private")
    def upload(file: str) -> gr.Dropdown:
        name = ctx.catalog.add_upload(file)
        try:
            ctx.wait_for_pipeline().load_adapter(ctx.workspace.uploads[name], name)
        except Exception:
            # It is not offered, and its file goes.
            shutil.rmtree(ctx.workspace.uploads.pop(name).parent, ignore_errors=True)
            raise
        return gr.Dropdown(choices=[NO_ADAPTER, *ctx.catalog.list_files()], value=name)
