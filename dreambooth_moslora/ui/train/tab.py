"""The Train tab: photos, a word, a button, and a view of the run. The server owns the run; the page only shows it."""

from collections.abc import Callable

import gradio as gr

from dreambooth_moslora.core.config.like import FoundRecipe
from dreambooth_moslora.core.run_files.adapter_files import NONE
from dreambooth_moslora.core.run_files.run_folder import RunDir
from dreambooth_moslora.ui.adapters.recipes import add_recipe, keep_recipe, like_line, recipe_names, recipe_of
from dreambooth_moslora.ui.adapters.summary import prompt_for, summary_of
from dreambooth_moslora.ui.app_state import AT_ONCE, TELLING, AppContext, as_gradio_error, as_user_error, sentence
from dreambooth_moslora.ui.generate.tab import GenerateTab
from dreambooth_moslora.ui.html_snippets import notice
from dreambooth_moslora.ui.input_errors import explain_bad_values
from dreambooth_moslora.ui.jobs.jobs import Jobs, settings_of
from dreambooth_moslora.ui.server.users import Visitor
from dreambooth_moslora.ui.train.cost_estimate import estimate_cost
from dreambooth_moslora.ui.train.form import form_of
from dreambooth_moslora.ui.train.masks import connect_masks
from dreambooth_moslora.ui.train.queue import connect_queue, queue_widgets
from dreambooth_moslora.ui.train.reopen import form_of_run, like_of_run, take_photos_of_run, values_like, values_of
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
    _connect_names(ctx, page, fields)
    _connect_like(ctx, fields, parts)
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


def _connect_names(ctx: AppContext, page: gr.Blocks, fields: dict) -> None:
    """The lists of adapters."""

    def connect(listed: Callable[[AppContext, Visitor], list[str]], widget: gr.Dropdown) -> None:
        def names(request: gr.Request) -> gr.Dropdown:
            return gr.Dropdown(choices=listed(ctx, ctx.visitors.of(request)))

        gr.on([page.load, widget.focus], names, None, widget, **AT_ONCE)

    connect(starts_for, fields["begin_with"])
    connect(recipe_names, fields["like"])


def _connect_like(ctx: AppContext, fields: dict, parts: dict) -> None:
    """An adapter's recipe into the form, and the crops as it makes them. A file without one is told below the list."""
    names = list(values_like(None, ctx.base_name))
    filled = [*(fields[name] for name in names), *review_widgets(parts)]
    outputs = [fields["like"], parts["like_said"], *filled]

    def choose(name: str | None, count: int, request: gr.Request) -> tuple:
        """A name without a recipe becomes “none”."""
        try:
            return like(str(name or NONE), count, ctx.visitors.of(request))
        except Exception as error:
            listed, _, *rest = like(NONE, count, ctx.visitors.of(request))
            return listed, mistake(error), *rest

    def upload(file: str, count: int, request: gr.Request) -> tuple:
        """A bad file changes nothing."""
        visitor = ctx.visitors.of(request)
        try:
            return like(add_recipe(ctx, file, visitor), count, visitor)
        except Exception as error:
            return gr.skip(), mistake(error), *([gr.skip()] * len(filled))

    def like(name: str, count: int, visitor: Visitor) -> tuple:
        recipe = recipe_of(ctx, name, visitor)
        values = values_like(recipe, ctx.base_name)
        listed = gr.Dropdown(choices=recipe_names(ctx, visitor), value=name)
        pictures = reviews(ctx, visitor, values["seed"], count, name)
        return listed, said_of(name, recipe), *(values[field] for field in names), *pictures

    def mistake(error: Exception) -> gr.HTML:
        return gr.HTML(notice(ctx.jobs.told(sentence(as_user_error(error))), "bad"), visible=True)

    options = {"show_progress_on": parts["like_said"], **TELLING}
    fields["like"].input(choose, [fields["like"], fields["subjects"]], outputs, **options)
    parts["upload_like"].upload(upload, [parts["upload_like"], fields["subjects"]], outputs, **options)


def said_of(name: str, recipe: FoundRecipe | None) -> gr.HTML:
    return gr.HTML(notice(like_line(name, recipe)) if recipe else "", visible=recipe is not None)


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
    shown = [*review_widgets(parts), parts["like_said"], parts["cost"]]
    outputs = [*(fields[name] for name in names), parts["photos"], *files, *shown]
    boxes = box_widgets(fields | parts)[1:]

    @as_gradio_error
    def reopen(run: str | None, request: gr.Request) -> tuple:
        visitor = ctx.visitors.of(request)
        job = jobs.owned(run or "", visitor.id)
        form = form_of_run(settings_of(job), job.run_dir / "photos")
        count = len(form.subjects)
        take_photos_of_run(job.run_dir, visitor, count)
        name, recipe = like_of_run(job.run_dir)
        keep_recipe(ctx, name, recipe, visitor)
        values = values_of(form)
        emptied = [None] * (1 + len(files))
        told = notice(f"The settings, words and photos of {job.name} are in the form. Change them, and start.")
        shown = (*reviews(ctx, visitor, form.seed, count, form.like), said_of(name, recipe), told)
        return (*(values[name] for name in names), *emptied, *shown, *boxes_for(count)[1:])

    parts["reopen"].click(reopen, parts["run"], [*outputs, *boxes], show_progress_on=parts["cost"], **TELLING)
