"""The Train tab: photos, a word, a button, watch. The run is the server's; the page only looks at it."""

import gradio as gr

from dreambooth_moslora.core.errors import UserError
from dreambooth_moslora.core.run_files.run_folder import RunDir
from dreambooth_moslora.ui.adapters.summary import prompt_for, summary_of
from dreambooth_moslora.ui.app_state import AT_ONCE, TELLING, AppContext, as_gradio_error
from dreambooth_moslora.ui.generate.form import NONE
from dreambooth_moslora.ui.generate.tab import GenerateTab
from dreambooth_moslora.ui.html_snippets import notice
from dreambooth_moslora.ui.input_errors import explain_bad_values
from dreambooth_moslora.ui.jobs.jobs import Jobs
from dreambooth_moslora.ui.server.users import Visitor
from dreambooth_moslora.ui.train.actions import PhotoReview, review_kept, review_photos
from dreambooth_moslora.ui.train.cost_estimate import estimate_cost
from dreambooth_moslora.ui.train.form import TrainForm
from dreambooth_moslora.ui.train.mask_corrections import take_with_masks
from dreambooth_moslora.ui.train.masks import connect_masks
from dreambooth_moslora.ui.train.more_subjects import prompts_of
from dreambooth_moslora.ui.train.queue import connect_queue, queue_widgets
from dreambooth_moslora.ui.train.start import add_to_queue, start_run
from dreambooth_moslora.ui.train.watch import connect_watch, run_names, watch_widgets
from dreambooth_moslora.ui.train.widgets import train_widgets

__all__ = ["build_train_tab"]

TAKING_PHOTOS = {"concurrency_limit": 4}
"""Options of events that take in photos: the visitors take turns photo by photo (`photo_uploads.ONE_AT_A_TIME`)."""


def build_train_tab(ctx: AppContext, jobs: Jobs, page: gr.Blocks, tabs: gr.Tabs, generate: GenerateTab) -> None:
    with gr.Row(elem_id="train", equal_height=False):
        with gr.Column(elem_id="train_form", min_width=280):
            fields, parts = train_widgets(ctx.base_name)
        with gr.Column(elem_id="train_watch", min_width=280):
            parts |= watch_widgets(queue_widgets)
    _connect_photos(ctx, page, parts, fields["seed"])
    _connect_start(ctx, jobs, fields, parts)
    connect_masks(ctx, fields, parts)
    connect_watch(ctx, jobs, page, parts)
    connect_queue(ctx, jobs, page, parts)
    _connect_use(ctx, jobs, parts, tabs, generate)


def _connect_photos(ctx: AppContext, page: gr.Blocks, parts: dict, seed: gr.Number) -> None:
    @as_gradio_error
    def review(photos: list[str] | None, seed: int, request: gr.Request) -> tuple:
        visitor = ctx.visitors.of(request)
        if not photos:
            visitor.forget_photos()
            return gr.HTML(visible=False), gr.Gallery(visible=False)
        return _reviewed(review_photos(ctx, photos, visitor, seed))

    @as_gradio_error
    def kept(seed: int, request: gr.Request) -> tuple:
        """After a reload, or with another seed: the photos that a run would be started with."""
        visitor = ctx.visitors.of(request)
        return _reviewed(review_kept(ctx, visitor, seed=seed)) if visitor.has_photos else (gr.skip(), gr.skip())

    shown_photos = [parts["remarks"], parts["crops"]]
    page.load(kept, seed, shown_photos, **AT_ONCE)
    seed.blur(kept, seed, shown_photos, **TELLING)
    gr.on(
        [parts["photos"].upload, parts["photos"].delete, parts["photos"].clear],
        review,
        [parts["photos"], seed],
        shown_photos,
        api_visibility="private",
        show_progress="minimal",
        **TAKING_PHOTOS,
    )


def _reviewed(found: PhotoReview) -> tuple:
    return gr.HTML(found.remarks, visible=True), gr.Gallery(found.crops, visible=True)


def _connect_start(ctx: AppContext, jobs: Jobs, fields: dict, parts: dict) -> None:
    def words(token: str, class_word: str) -> gr.HTML:
        try:
            instance, class_prompt = prompts_of(token, class_word)
        except UserError:
            return gr.HTML(visible=False)
        return gr.HTML(notice(f"Learns “{instance}” and tells it from “{class_prompt}”."), visible=True)

    def with_photos(photos: list[str] | None, request: gr.Request) -> Visitor:
        visitor = ctx.visitors.of(request)
        if photos:
            take_with_masks(photos, visitor)
        return visitor

    @as_gradio_error
    def train(photos: list[str] | None, request: gr.Request, **values) -> tuple:
        visitor = with_photos(photos, request)
        job, chosen = start_run(ctx, jobs, TrainForm(**values), visitor)
        names = gr.Dropdown(choices=run_names(jobs, visitor.id), value=job.name)
        return names, notice(f"The run {job.name} is starting."), chosen

    @as_gradio_error
    def queue(photos: list[str] | None, request: gr.Request, **values) -> str:
        visitor = with_photos(photos, request)
        return add_to_queue(ctx, jobs, TrainForm(**values), visitor)[1]

    @as_gradio_error
    def estimate(photos: list[str] | None, request: gr.Request, **values) -> str:
        return estimate_cost(ctx, jobs, TrainForm(**values), with_photos(photos, request))

    for widget in fields.values():
        explain_bad_values(widget)
    inputs = {"photos": parts["photos"], **fields}
    gr.on(
        [fields["token"].change, fields["class_word"].change],
        words,
        [fields["token"], fields["class_word"]],
        parts["prompts"],
        **AT_ONCE,
    )
    chosen = gr.State("")  # what a program does not see: `/train` answers with two values
    started = [parts["run"], parts["status"], chosen]
    chosen.change(lambda card: card, chosen, parts["cost"], **AT_ONCE)
    parts["start"].click(train, inputs_kwargs=inputs, outputs=started, api_name="train", **TAKING_PHOTOS)
    parts["queue"].click(queue, inputs_kwargs=inputs, outputs=parts["cost"], api_name="add_to_queue", **TAKING_PHOTOS)
    parts["estimate"].click(estimate, inputs_kwargs=inputs, outputs=parts["cost"], api_name="estimate", **TAKING_PHOTOS)


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
