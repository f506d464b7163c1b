"""The Train tab: photos, a word, a button, and a view of the run. The server owns the run; the page only shows it."""

import gradio as gr

from dreambooth_moslora.core.run_files.run_folder import RunDir
from dreambooth_moslora.ui.adapters.summary import prompt_for, summary_of
from dreambooth_moslora.ui.app_state import AT_ONCE, TELLING, AppContext, as_gradio_error
from dreambooth_moslora.ui.generate.form import NONE
from dreambooth_moslora.ui.generate.tab import GenerateTab
from dreambooth_moslora.ui.html_snippets import notice
from dreambooth_moslora.ui.input_errors import explain_bad_values
from dreambooth_moslora.ui.jobs.jobs import Jobs, settings_of
from dreambooth_moslora.ui.server.users import Visitor
from dreambooth_moslora.ui.train.cost_estimate import estimate_cost
from dreambooth_moslora.ui.train.form import form_of
from dreambooth_moslora.ui.train.masks import connect_masks
from dreambooth_moslora.ui.train.queue import connect_queue, queue_widgets
from dreambooth_moslora.ui.train.reopen import form_of_run, take_photos_of_run, values_of
from dreambooth_moslora.ui.train.start import add_to_queue, start_run, starts_for
from dreambooth_moslora.ui.train.subject_widgets import (
    TAKING_PHOTOS,
    box_widgets,
    boxes_for,
    connect_subjects,
    review_widgets,
    reviews,
    take_given,
)
from dreambooth_moslora.ui.train.watch import connect_watch, run_names, watch_widgets
from dreambooth_moslora.ui.train.widgets import train_widgets

__all__ = ["build_train_tab"]

SHOW_STATUS = """() => {
  if (innerWidth <= 760) document.getElementById("train_status").scrollIntoView({block: "center"});
}"""
"""On a phone the run stands below the whole form."""
Files = list[str] | None
"""Uploads of a subject; those of a further subject may be missing."""


def build_train_tab(ctx: AppContext, jobs: Jobs, page: gr.Blocks, tabs: gr.Tabs, generate: GenerateTab) -> None:
    with gr.Row(elem_id="train", equal_height=False):
        with gr.Column(elem_id="train_form", min_width=280):
            fields, parts = train_widgets(ctx.base_name)
        with gr.Column(elem_id="train_watch", min_width=280):
            parts |= watch_widgets(queue_widgets)
    connect_subjects(ctx, page, fields, parts)
    _connect_start(ctx, jobs, fields, parts)
    _connect_begin(ctx, page, fields["begin_with"])
    connect_masks(ctx, fields, parts)
    connect_watch(ctx, jobs, page, parts)
    connect_queue(ctx, jobs, page, parts)
    _connect_use(ctx, jobs, parts, tabs, generate)
    _connect_reopen(ctx, jobs, fields, parts)


def _connect_start(ctx: AppContext, jobs: Jobs, fields: dict, parts: dict) -> None:
    def with_photos(request: gr.Request, *files: Files) -> Visitor:
        visitor = ctx.visitors.of(request)
        take_given(files, visitor)
        return visitor

    @as_gradio_error
    def train(
        photos: Files,
        request: gr.Request,
        photos_2: Files = None,
        photos_3: Files = None,
        photos_4: Files = None,
        **values,
    ) -> tuple:
        visitor = with_photos(request, photos, photos_2, photos_3, photos_4)
        job, chosen = start_run(ctx, jobs, form_of(values), visitor)
        names = gr.Dropdown(choices=run_names(jobs, visitor.id), value=job.name)
        return names, notice(f"The run {job.name} is starting."), chosen

    @as_gradio_error
    def queue(
        photos: Files,
        request: gr.Request,
        photos_2: Files = None,
        photos_3: Files = None,
        photos_4: Files = None,
        **values,
    ) -> str:
        visitor = with_photos(request, photos, photos_2, photos_3, photos_4)
        return add_to_queue(ctx, jobs, form_of(values), visitor)[1]

    @as_gradio_error
    def estimate(
        photos: Files,
        request: gr.Request,
        photos_2: Files = None,
        photos_3: Files = None,
        photos_4: Files = None,
        **values,
    ) -> str:
        return estimate_cost(ctx, jobs, form_of(values), with_photos(request, photos, photos_2, photos_3, photos_4))

    for widget in fields.values():
        if not isinstance(widget, gr.File):
            explain_bad_values(widget)
    inputs = {"photos": parts["photos"], **fields}
    chosen = gr.State("")  # hidden from programs: `/train` returns two values
    started = [parts["run"], parts["status"], chosen]
    chosen.change(lambda card: card, chosen, parts["cost"], **AT_ONCE)
    click = parts["start"].click(train, inputs_kwargs=inputs, outputs=started, api_name="train", **TAKING_PHOTOS)
    click.success(None, js=SHOW_STATUS, **AT_ONCE)
    parts["queue"].click(queue, inputs_kwargs=inputs, outputs=parts["cost"], api_name="add_to_queue", **TAKING_PHOTOS)
    parts["estimate"].click(estimate, inputs_kwargs=inputs, outputs=parts["cost"], api_name="estimate", **TAKING_PHOTOS)


def _connect_begin(ctx: AppContext, page: gr.Blocks, begin_with: gr.Dropdown) -> None:
    def names(request: gr.Request) -> gr.Dropdown:
        return gr.Dropdown(choices=starts_for(ctx, ctx.visitors.of(request)))

    gr.on([page.load, begin_with.focus], names, None, begin_with, **AT_ONCE)


def _connect_use(ctx: AppContext, jobs: Jobs, parts: dict, tabs: gr.Tabs, generate: GenerateTab) -> None:
    @as_gradio_error
    def use(run: str | None, request: gr.Request) -> tuple:
        visitor = ctx.visitors.of(request)
        job = jobs.owned(run or "", visitor.id)
        name = ctx.catalog.name_of(RunDir(job.run_dir).adapter_path, visitor)
        files = ctx.catalog.files(visitor)
        summary = summary_of(files[name])
        chosen = gr.Dropdown(choices=[NONE, *files], value=name)
        return gr.Tabs(selected="generate"), chosen, prompt_for(summary), summary.scale

    shown = [tabs, generate.adapters[0], generate.prompt, generate.fields["scale"]]
    parts["use"].click(use, parts["run"], shown, show_progress_on=generate.prompt, **TELLING)


def _connect_reopen(ctx: AppContext, jobs: Jobs, fields: dict, parts: dict) -> None:
    """A run's settings, words and photos into the form."""
    names = [name for name, field in fields.items() if not isinstance(field, gr.File)]
    files = [field for field in fields.values() if isinstance(field, gr.File)]
    outputs = [*(fields[name] for name in names), parts["photos"], *files, *review_widgets(parts), parts["cost"]]
    boxes = box_widgets(fields | parts)[1:]

    @as_gradio_error
    def reopen(run: str | None, request: gr.Request) -> tuple:
        visitor = ctx.visitors.of(request)
        job = jobs.owned(run or "", visitor.id)
        form = form_of_run(settings_of(job), job.run_dir / "photos")
        count = len(form.subjects)
        take_photos_of_run(job.run_dir, visitor, count)
        values = values_of(form)
        emptied = [None] * (1 + len(files))
        told = notice(f"The settings, words and photos of {job.name} are in the form. Change them, and start.")
        pictures = reviews(ctx, visitor, form.seed, count)
        return (*(values[name] for name in names), *emptied, *pictures, told, *boxes_for(count)[1:])

    parts["reopen"].click(reopen, parts["run"], [*outputs, *boxes], show_progress_on=parts["cost"], **TELLING)
