"""Adapter of the Generate tab: its list, its summary, and uploads."""

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
    """Return the first adapter that may fit the page's base: a toy's fits toys alone."""
    for name, file in ctx.catalog.list_files().items():
        if is_toy(read_summary(file).base) == is_toy(ctx.base_name):
            return name
    return NO_ADAPTER


def connect_adapters(ctx: state.AppContext, page: gr.Blocks, fields: dict, buttons: dict) -> None:
    """Refresh the list, and show the summary and prompt of the selected adapter."""
    adapter = fields["adapter"]
    prompt = fields["prompt"]

    @on(gr.api, api_name="adapters", queue=False)
    def list_adapters() -> list[dict]:
        """Return the name and summary of every adapter."""
        files = ctx.catalog.list_files()
        return [{"name": name, **asdict(read_summary(file))} for name, file in files.items()]

    # Runs may have written new adapters.
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
        sentence = summary.format_sentence()
        # Replace the prompt of another adapter, but none that the user has written.
        first_prompts = {"", *(read_summary(file).prompt for file in files.values())}
        is_untouched = (old_prompt or "").strip() in first_prompts
        new_prompt = (summary.prompt if is_untouched else "") or old_prompt
        return gr.HTML(render_faint(sentence), visible=bool(sentence)), new_prompt


def connect_upload(ctx: state.AppContext, fields: dict, button: gr.UploadButton) -> None:
    """Load an uploaded adapter at once, to report now if it does not fit the base."""
    adapter = fields["adapter"]

    @on(button.upload, GPU_EVENT, inputs=button, outputs=adapter, api_visibility="private")
    def upload(file: str) -> gr.Dropdown:
        name = ctx.catalog.add_upload(file)
        try:
            ctx.wait_for_pipeline().load_adapter(ctx.workspace.uploads[name], name)
        except Exception:
            # An adapter that does not fit is not offered, and its file is deleted.
            shutil.rmtree(ctx.workspace.uploads.pop(name).parent, ignore_errors=True)
            raise
        return gr.Dropdown(choices=[NO_ADAPTER, *ctx.catalog.list_files()], value=name)
